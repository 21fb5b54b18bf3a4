"""The kernel for keys in pages on a CUDA device: numbers, no waits, and one CUDA graph for many lengths."""

from dataclasses import replace

import pytest
import torch

from sglang_mm.kernels import join_partials, paged_attention
from sglang_mm.kernels.triton_backend import launch, paged
from tests.kernels.paged_cases import SCALE, assert_exact, draw

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [0, 1, 130, 128, 700, 3001]
COUNTS = [2, 1, 0, 3, 130, 33]


@pytest.fixture(params=["one part", "parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(paged, "count_parts", lambda *_: 1 if request.param == "one part" else 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(7, 1, 128), (16, 2, 64), (6, 6, 80), (16, 1, 96)], ids=str)
@pytest.mark.parametrize("counts", [None, COUNTS], ids=["decode", "follow-up"])
def test_values(counts, heads, dtype, parts):
    case = draw(3, 22, LENGTHS, heads=heads, dtype=dtype, counts=counts)
    there = case.to("cuda")
    for rank in range(3):
        first, again = (there.attend(rank, "triton") for _ in range(2))
        assert_exact(first, case, rank, merges=20)
        assert all(map(torch.equal, first, again))
    assert_exact(there.everywhere("triton"), case, merges=60)


def test_it_is_what_auto_takes():
    there = draw(2, 32, [500], heads=(7, 1, 128), dtype=torch.bfloat16).to("cuda")
    assert all(map(torch.equal, there.attend(0), there.attend(0, "triton")))
    assert_exact(there.attend(0, "reference"), there, 0)


def test_nothing_waits_and_a_graph_serves_later_lengths():
    """A graph captured when requests are short, replayed when they are long, from the same tables."""
    case = draw(2, 32, [3000, 500, 77], heads=(14, 2, 128), dtype=torch.bfloat16)
    there = case.to("cuda")
    tables = [replace(there.table(rank, [5, 1, 0]), lengths_cpu=None) for rank in range(2)]

    def step():
        found = [paged_attention(there.q, *there.pools[n], tables[n], scale=SCALE, backend="triton") for n in range(2)]
        return join_partials(*(torch.stack(each) for each in zip(*found)))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = step()
    for lengths in ([3000, 500, 77], [3000, 0, 77], [2999, 500, 65]):
        for table in tables:
            table.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        cut = [[each[:length] for each, length in zip(kv, lengths)] for kv in (case.keys, case.values)]
        assert_exact(state, replace(case, keys=cut[0], values=cut[1]), merges=2 * 264)


@pytest.mark.slow
def test_slots_further_than_int32_can_say():
    """The last pages of a pool of 2^31 and some numbers; 9 GB."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GB of GPU memory are free")
    case = draw(1, 64, [300], heads=(7, 1, 128), dtype=torch.bfloat16)
    there, shift = case.to("cuda"), 2**24 // 64 * 64
    pools = torch.full((2, shift + len(case.pools[0][0]), 1, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    for pool, given in zip(pools, there.pools[0]):
        pool[shift:] = given
    table = replace(there.table(0), slots=there.slots + shift)
    got = paged_attention(there.q, *pools, table, scale=SCALE, backend="triton")
    assert_exact(got, case, 0, merges=launch._processors(pools.device))
