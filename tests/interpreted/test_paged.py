"""The kernel for keys in pages, and the one that joins parts, in the interpreter."""

from dataclasses import replace

import numpy
import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import join_partials, paged_attention
from sglang_mm.kernels.triton_backend import launch, paged
from sglang_mm.kernels.triton_backend.configs import Config
from sglang_mm.kernels.triton_backend.merge import join_parts
from sglang_mm.types import Residence
from tests.kernels.merging import EMPTY
from tests.kernels.merging import draw as draw_partial
from tests.kernels.paged_cases import SCALE, assert_exact, draw

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
LENGTHS = [0, 1, 11, 12, 150]
"""Without keys, around a page of 12, and of several steps of 64 keys."""
COUNTS = [2, 1, 0, 3, 33]
"""Of tiles of 16 rows in `SMALL`: none, parts of one, and more than two."""
SMALL = Config(64, 16, 4, 1, tma=False)


@pytest.fixture(params=[1, 3], ids=["one part", "parts"])
def parts(request, monkeypatch):
    """Of three parts most are empty for short requests."""
    monkeypatch.setattr(paged, "count_parts", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
def test_decode(ranks, dtype, parts):
    case = draw(ranks, 12 // ranks, LENGTHS, heads=(7, 1, 24), dtype=dtype)
    for rank in range(ranks):
        assert_exact(case.attend(rank, "triton"), case, rank, merges=parts)


@pytest.mark.parametrize("config", [None, SMALL], ids=["as shipped", "several tiles"])
def test_follow_ups(config, parts, monkeypatch):
    if config:
        monkeypatch.setattr(paged, "choose_paged_config", lambda *_: config)
    case = draw(2, 6, LENGTHS, heads=(6, 2, 16), dtype=torch.float16, counts=COUNTS)
    assert_exact(case.attend(1, "triton"), case, 1, merges=parts)


@pytest.mark.parametrize("counts", [[1], [0, 0, 5], [40], [1] * 20], ids=str)
def test_any_rows_of_requests(counts, monkeypatch):
    """One, none before the last, tiles of one alone, and more requests than a table of 16."""
    monkeypatch.setattr(paged, "choose_paged_config", lambda *_: SMALL)
    case = draw(
        2, 3, [9 + number for number in range(len(counts))], heads=(2, 1, 8), dtype=torch.float32, counts=counts
    )
    assert_exact(case.attend(1, "triton"), case, 1)


@pytest.mark.parametrize("heads", [(1, 1, 8), (4, 4, 40), (16, 1, 128), (10, 2, 80)], ids=str)
def test_heads(heads):
    case = draw(2, 3, [20, 7], heads=heads, dtype=torch.float32)
    assert_exact(case.attend(1, "triton"), case, 1)


@pytest.mark.parametrize(("ranks", "share"), [(1, 1), (4, 1), (3, 22), (4, 16)])
def test_pages(ranks, share):
    case = draw(ranks, share, [ranks * share * 2 + 1, 3], dtype=torch.float32)
    for rank in range(ranks):
        assert_exact(case.attend(rank, "triton"), case, rank)


def test_it_is_the_reference_number_by_number():
    case = draw(2, 3, [50, 7], dtype=torch.float32, counts=[4, 9])
    for one, other in zip(case.attend(0, "triton"), case.attend(0, "reference")):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_many_processors_make_many_parts(monkeypatch):
    monkeypatch.setattr(launch, "_processors", lambda _: 8)
    monkeypatch.setattr(paged, "SHORTEST", 16)
    made = []
    monkeypatch.setattr(paged, "join_parts", lambda outs, lses: made.append(len(outs)) or join_parts(outs, lses))
    case = draw(2, 6, [150], dtype=torch.float32)
    assert_exact(case.attend(0, "triton"), case, 0, merges=6)
    assert made == [6]  # 162 slots of a context are 81 of this rank's: more than 5 * 16


def test_strides_and_the_dtypes_of_tables():
    case = draw(2, 3, [20, 9, 2], dtype=torch.float32)
    fused = torch.full((3, 9, 16), float("nan"))
    fused[:, 1:5, 4:12] = case.q
    both = torch.stack(case.pools[0], 2)
    short = replace(case.table(0), rows=case.rows.int(), lengths=torch.tensor(case.lengths).int(), lengths_cpu=None)
    out = paged_attention(fused[:, 1:5, 4:12], both[:, :, 0], both[:, :, 1], short, scale=SCALE, backend="triton")
    assert all(map(torch.equal, out, case.attend(0, "triton")))


def test_slots_further_than_int32_can_say(tmp_path):
    """In files of which only the touched pages exist: slot 9 begins at element 9 * 2^28 > 2^31."""
    case = draw(1, 2, [7], heads=(2, 1, 8), dtype=torch.float32)
    pools = []
    for number, pool in enumerate(case.pools[0]):
        large = torch.from_numpy(numpy.memmap(tmp_path / str(number), numpy.float32, "w+", shape=(len(pool) * 2**28)))
        pools.append(large.as_strided(pool.shape, (2**28, 8, 1)))
        pools[-1].copy_(pool)
    assert int(case.slots[case.rows[0], :7].max()) > 8
    got = paged_attention(case.q, *pools, case.table(0), scale=SCALE, backend="triton")
    assert_exact(got, case, 0)


def test_nan_is_not_taken_for_a_row_without_keys(parts):
    case = draw(1, 4, [30, 30], dtype=torch.float32)
    case.q[1, 0, 0] = float("nan")
    out, lse = case.attend(0, "triton")
    assert out[1, 0].isnan().all() and lse[0, 1].isnan()
    assert out[0].isfinite().all() and out[1, 1:].isfinite().all()


def test_scores_too_large_for_exp(parts):
    case = draw(1, 4, [30], dtype=torch.float32)
    case.q.mul_(1e4)
    out, lse = case.attend(0, "triton")
    want = case.attend(0, "reference")
    assert out.isfinite().all() and float(lse.max()) > 1e3
    assert float((out - want[0]).abs().max()) < float(want[1].abs().max()) * 2**-23 * 16


@pytest.mark.parametrize(
    "plant",
    [
        lambda case: {"table": replace(case.table(1), residence=Residence(3, 2, 6))},
        lambda case: {"table": case.table(1, [length - 1 for length in case.lengths])},
        lambda case: {"queries_ptr": torch.tensor([0, 1, 4])},
        lambda case: {"scale": 1.001 * SCALE},
    ],
    ids=["another rank", "a token less", "other rows", "scale"],
)
def test_a_planted_error_is_seen(plant):
    case = draw(3, 2, [22, 22], dtype=torch.float32, counts=[2, 2])
    assert_exact(case.attend(1, "triton"), case, 1)
    with pytest.raises(AssertionError, match="out: "):
        assert_exact(case.attend(1, "triton", **plant(case)), case, 1)


def test_a_lost_part_is_seen(monkeypatch):
    monkeypatch.setattr(paged, "count_parts", lambda *_: 3)
    monkeypatch.setattr(paged, "join_parts", lambda outs, lses: join_parts(outs[:-1], lses[:-1]))
    case = draw(1, 4, [200], dtype=torch.float32)
    with pytest.raises(AssertionError, match="out: "):
        assert_exact(case.attend(0, "triton"), case, 0)


def test_nothing_to_attend():
    case = draw(2, 3, [], dtype=torch.float32)
    assert [tuple(each.shape) for each in case.attend(0, "triton")] == [(0, 4, 8), (4, 0)]
    with pytest.raises(ConfigError, match="bfloat16 in the interpreter"):
        draw(2, 3, [3], dtype=torch.bfloat16).attend(0, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 16, 37])
def test_parts_are_joined(count, dtype):
    """As torch does in fp64. Of parts without keys nothing is read: it may be NaN."""
    cases = [draw_partial(5, 3, 20, seed=seed) for seed in range(count)]
    outs, lses = torch.stack([case.out for case in cases]).to(dtype), torch.stack([case.lse for case in cases])
    lses[:, 1, 2], outs[:, 2, 1] = EMPTY, 0
    want = join_partials(outs.double(), lses.double())
    outs[lses.transpose(1, 2) == EMPTY] = float("nan")
    out, lse = join_parts(outs, lses)
    assert torch.equal(lse.isinf(), want[1].isinf()) and lse[1, 2] == EMPTY and not out[2, 1].any()
    torch.testing.assert_close(out, want[0].float(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(lse, want[1].float(), rtol=1e-5, atol=2e-5)
