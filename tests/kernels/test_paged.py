"""Attention over keys that rest on several ranks, in torch: against dense attention in fp64; planted errors."""

from dataclasses import replace

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import PageTable, join_partials, merge, merge_partials, paged, paged_attention
from sglang_mm.kernels.problem import Problem
from sglang_mm.kernels.triton_backend import paged as by_triton
from sglang_mm.types import Residence
from tests.kernels.paged_cases import SCALE, assert_exact, draw

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
LENGTHS = [0, 1, 5, 11, 12, 13, 24, 40]
"""Around pages of 12 and shares of 12, 6, 4 and 3."""
COUNTS = [2, 1, 0, 3, 1, 5, 1, 2]


@pytest.fixture
def small_chunks(monkeypatch):
    """Two pages at once."""
    monkeypatch.setattr(paged, "KEYS", 2)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [None, COUNTS], ids=["decode", "follow-up"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_attends_to_what_it_keeps_and_all_of_them_to_everything(ranks, counts, dtype, backend):
    case = draw(ranks, 12 // ranks, LENGTHS, dtype=dtype, counts=counts)
    for rank in range(ranks):
        out, lse = case.attend(rank, backend)
        assert out.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_exact((out, lse), case, rank)
    assert_exact(case.everywhere(backend), case, merges=ranks)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_long_requests_are_taken_in_chunks(backend, small_chunks):
    case = draw(3, 2, [61, 30, 7], heads=(6, 2, 16), dtype=torch.float32, counts=[4, 1, 2])
    for rank in range(3):
        assert_exact(case.attend(rank, backend), case, rank, merges=11)


@pytest.mark.parametrize("heads", [(7, 1, 8), (3, 3, 8), (8, 1, 20)])
def test_heads_meet_the_keys_of_their_group(heads):
    case = draw(2, 3, [10, 4], heads=heads, counts=[2, 3])
    assert_exact(case.everywhere(), case, merges=2)


def test_a_follow_up_is_decoding_row_by_row():
    case = draw(2, 3, [20, 9], dtype=torch.float32, counts=[3, 2])
    twice = torch.tensor([0, 0, 0, 1, 1])
    lengths = torch.tensor(case.lengths)[twice]
    table = PageTable(case.slots, case.rows[twice], lengths, lengths, case.residences[1])
    for one, other in zip(case.attend(1), case.attend(1, table=table, queries_ptr=None)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_follow_up_and_its_own_rows():
    """A cached prefix on three ranks, and the new rows' keys beside it, are one causal prompt."""
    from sglang_mm.kernels import causal_attention

    case = draw(3, 2, [31], counts=[6])
    k, v = torch.randn(2, 6, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    new = torch.arange(31, 37)
    state = case.everywhere()
    merge(*state, *causal_attention(case.q, k, v, new, new, scale=SCALE))
    all_k, all_v = torch.cat([case.keys[0], k]), torch.cat([case.values[0], v])
    whole = causal_attention(case.q, all_k, all_v, new, torch.arange(37), scale=SCALE)
    for one, other in zip(state, whole):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_queries_may_have_any_stride_and_lengths_may_be_on_the_device_alone():
    case = draw(2, 3, [20, 9, 2])
    fused = torch.full((3, 9, 16), float("nan"), dtype=torch.float64)
    fused[:, 1:5, 4:12] = case.q
    table = replace(case.table(0), lengths_cpu=None)
    out, lse = paged_attention(fused[:, 1:5, 4:12], *case.pools[0], table, scale=SCALE)
    assert all(map(torch.equal, (out, lse), case.attend(0)))


@pytest.mark.parametrize(
    "plant",
    [
        lambda case: {"scale": 1.001 * SCALE},
        lambda case: {"table": replace(case.table(1), residence=Residence(3, 2, 6))},
        lambda case: {"table": replace(case.table(1), residence=Residence(6, 2, 6))},
        lambda case: {"table": case.table(1, [length - 1 for length in case.lengths])},
        lambda case: {"table": replace(case.table(1), rows=case.rows.flip(0))},
        lambda case: {"table": replace(case.table(1), slots=torch.cat([case.slots[:, :6], case.slots[:, :-6]], 1))},
        lambda case: {"queries_ptr": torch.tensor([0, 1, 4])},
    ],
    ids=["scale", "another rank", "other shares", "a token less", "another request", "another page", "other rows"],
)
def test_a_planted_error_is_seen(plant):
    """Of lengths whose last token rank 1 keeps, so that a token less is a key less."""
    case = draw(3, 2, [22, 22], counts=[2, 2])
    assert_exact(case.attend(1), case, 1)
    with pytest.raises(AssertionError, match="out: "):
        assert_exact(case.attend(1, **plant(case)), case, 1)


def test_a_planted_error_of_joining_is_seen():
    case = draw(3, 2, [22, 10])
    outs, lses = (torch.stack(each) for each in zip(*(case.attend(rank) for rank in range(3))))
    assert_exact(join_partials(outs, lses), case, merges=3)
    for wrong in (
        join_partials(outs[:2], lses[:2]),
        join_partials(outs[[0, 1, 1]], lses),
        (outs.mean(0), torch.logsumexp(lses, 0)),
        (merge_partials(outs, lses), lses.amax(0)),
    ):
        with pytest.raises(AssertionError, match="error"):
            assert_exact(wrong, case, merges=3)


def table(**changes) -> PageTable:
    given = {"slots": torch.zeros(3, 20).int(), "rows": torch.tensor([0, 2]), "lengths": torch.tensor([9, 20])}
    return PageTable(**given | {"lengths_cpu": [9, 20], "residence": Residence(2, 0, 4)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "Hq a multiple of Hkv"),
        ({"k_pool": torch.zeros(12, 2, 4)}, "Hq a multiple of Hkv"),
        ({"q": torch.zeros(2, 4, 8).half()}, "float16.*one dtype on one device"),
        ({"q": torch.zeros(3, 4, 8)}, "3 query rows of 2 requests, queries_ptr none"),
        ({"queries_ptr": torch.tensor([0, 2])}, r"queries_ptr \(2,\).*\(3,\)"),
        ({"table": table(rows=torch.tensor([0]))}, "1 rows, 2 lengths, 2 of them on the host"),
        ({"table": table(lengths_cpu=[9])}, "2 rows, 2 lengths, 1 of them on the host"),
        ({"table": table(lengths_cpu=[9, 21])}, "a request of 21 keys.*0 .. 20"),
        ({"table": table(slots=torch.zeros(3, 20).long())}, "slots of torch.int64"),
        ({"table": table(slots=torch.zeros(20, 3).int().T)}, "dense rows"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"backend": "fa3"}, "'fa3'.*auto, cpu_flash, triton, reference"),
        ({"backend": "triton"}, "needs a CUDA device, not cpu"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    pools = {"k_pool": torch.zeros(12, 2, 8), "v_pool": torch.zeros(12, 2, 8)}
    given = {"q": torch.zeros(2, 4, 8), **pools, "table": table(), "scale": 1.0} | changes
    with pytest.raises(ConfigError, match=message):
        paged_attention(given.pop("q"), given.pop("k_pool"), given.pop("v_pool"), given.pop("table"), **given)


def test_cpu_flash_is_for_the_cpu():
    q, pool, slots = torch.zeros(1, 2, 8, device="meta"), torch.zeros(4, 2, 8, device="meta"), torch.zeros(1, 4).int()
    one = torch.ones(1, device="meta").long()
    there = PageTable(slots.to("meta"), one, one, [1], Residence(1, 0, 4))
    with pytest.raises(ConfigError, match="needs tensors on cpu, not meta"):
        paged_attention(q, pool, pool, there, scale=1.0, backend="cpu_flash")
    assert paged.backend_for(q, pool) == "reference"
    assert paged.backend_for(torch.zeros(1, 2, 8), pool) == "cpu_flash"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"heads": 64}, None),
        ({"heads": 68}, "takes up to 16 query heads per K/V head, not 17"),
        ({"dtype": torch.float64}, "does not take torch.float64"),
        ({"head_dim": 132}, "multiples of 8 up to 128, not 132"),
        ({"capability": 75}, "needs sm_80 or later, not sm_75"),
    ],
)
def test_what_the_kernel_takes(changes, message):
    given = {"capability": 90, "dtype": torch.bfloat16, "heads": 28, "kv_heads": 4, "head_dim": 128}
    found = by_triton.unfit(Problem(torch.device("cuda"), rows=1, keys=9, items=0, entries=0, **given | changes))
    assert found == message if message is None else message in found


def test_how_many_parts_there_are():
    """Of 132 processors: two instances each, none of less than 256 keys."""
    assert [by_triton.count_parts(each, 1 << 20, 132) for each in (1, 4, 100, 264, 9999)] == [264, 66, 3, 1, 1]
    assert [by_triton.count_parts(4, keys, 132) for keys in (0, 256, 257, 1000)] == [1, 1, 2, 4]
