"""The merge kernel against the merge in fp64, in Triton's interpreter."""

import numpy
import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import empty_state, merge
from sglang_mm.kernels.triton_backend.merge import merge_state
from tests.kernels.merging import DTYPES, EMPTY, SIZES, assert_merged, draw, merged_exactly

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype):
    """The rows that need not be read hold NaN."""
    case = draw(*size, dtype)
    given = case.poisoned()
    merge_state(*given)
    assert_merged(given[:2], case)


def test_the_cases_have_all_kinds_of_rows():
    """Without them the test above would prove less than it says; torch's merge shows that NaN would be seen."""
    case = draw(*SIZES[4])
    lone, lone_i = case.lse == EMPTY, case.lse_i == EMPTY
    assert all(bool(rows.any()) for rows in (lone & lone_i, lone & ~lone_i, ~lone & lone_i, ~lone & ~lone_i))
    given = case.poisoned()
    merge(*given)
    assert given.out.isnan().any()


@pytest.mark.parametrize("lse, lse_i, share", [(3e4, -3e4, 1.0), (-3e4, 3e4, 0.0), (3e4, 3e4, 0.5), (-3e4, -3e4, 0.5)])
def test_far_apart_scores_do_not_overflow(lse, lse_i, share):
    state = torch.ones(1, 1, 4), torch.tensor([[lse]])
    merge_state(*state, torch.zeros(1, 1, 4), torch.tensor([[lse_i]]))
    assert torch.equal(state[0], torch.full((1, 1, 4), share))
    assert state[1].item() == pytest.approx(max(lse, lse_i), abs=1)


def test_a_side_without_keys_changes_nothing():
    """Not one bit, whatever lies in its rows."""
    full = draw(21, 2, 32, seed=1)
    out, lse = full.out.clone(), full.lse.clone()
    merge_state(out, lse, torch.full_like(out, float("nan")), torch.full_like(lse, EMPTY))
    assert torch.equal(out, full.out) and torch.equal(lse, full.lse)
    state = empty_state(full.out)
    merge_state(*state, full.out, full.lse)
    assert torch.equal(state[0], full.out) and torch.equal(state[1], full.lse)


def test_nan_is_not_hidden():
    state = empty_state(torch.zeros(2, 1, 8))
    merge_state(*state, torch.ones(2, 1, 8), torch.tensor([[float("nan"), 0.0]]))
    assert state[0][0].isnan().all() and state[1][0, 0].isnan() and not state[0][1].isnan().any()


def test_views():
    """A slice of rows, heads and numbers of the state; a partial result by heads; lse by rows. No more is touched."""
    case = draw(20, 2, 24, seed=2)
    large, large_lse = torch.full((30, 4, 40), 7.0), torch.full((30, 4), 7.0)
    out, lse = large[5:25, 1:3, 8:32], large_lse[5:25, 1:3].T
    out.copy_(case.out), lse.copy_(case.lse)
    by_head, by_row = case.out_i.transpose(0, 1).contiguous(), case.lse_i.T.contiguous()
    merge_state(out, lse, by_head.transpose(0, 1), by_row.T)
    assert_merged((out, lse), case)
    out.fill_(7), lse.fill_(7)
    assert (large == 7).all() and (large_lse == 7).all()


def test_rows_further_than_int32_can_say(tmp_path):
    """In a file of which only the touched pages exist: row 11 begins at element 11 * 2^28 > 2^31."""
    case = draw(12, 1, 4, seed=3)
    large = torch.from_numpy(numpy.memmap(tmp_path / "large", numpy.float32, "w+", shape=(11 * 2**28 + 4)))
    out = large.as_strided((12, 1, 4), (2**28, 4, 1))
    out.copy_(case.out)
    merge_state(out, case.lse.clone(), case.out_i, case.lse_i)
    assert_merged((out, merged_exactly(case)[1]), case)


def test_any_order_gives_the_same():
    """Six partial results, in two orders: each is within n steps of exact, so the two are within twice that.

    With M, L the largest |out| and |lse|: a merge is off by 9 eps M and (5 + L / 2) eps, as `assert_merged` derives.
    The error of lse, n (5 + L / 2) eps at most, moves a share by a quarter of it, and out by M / 2 times it; n times.
    """
    pieces = [draw(24, 2, 16, seed=seed) for seed in range(6)]
    results = []
    for order in (pieces, pieces[::-1]):
        state = empty_state(pieces[0].out)
        for piece in order:
            merge_state(*state, piece.out, piece.lse)
        results.append(state)
    n, (out, lse), (other, other_lse) = len(pieces), *results
    largest = max(float(piece.out.abs().max()) for piece in pieces)
    largest_lse = max(float(piece.lse[piece.lse.isfinite()].abs().max()) for piece in pieces)
    off_lse = n * (5 + (largest_lse + 2) / 2) * EPS  # a sum of 6 adds log 6 < 2
    off_out = n * 9 * EPS * largest + n * off_lse * largest / 2
    assert torch.equal(lse.isinf(), other_lse.isinf()) and not lse.isinf().all()
    assert (out - other).abs().max() <= 2 * off_out
    assert (lse - other_lse).nan_to_num(nan=0).abs().max() <= 2 * off_lse


@pytest.mark.parametrize("size", [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
def test_nothing_to_merge(size):
    out, lse = empty_state(torch.zeros(size))
    merge_state(out, lse, torch.zeros(size), torch.full((size[1], size[0]), EMPTY))
    assert out.shape == size


@pytest.mark.parametrize(
    ("out_i", "lse", "lse_i"),
    [
        ((4, 2, 8), (2, 3), (2, 3)),
        ((3, 1, 8), (2, 3), (2, 3)),
        ((3, 2, 8), (3, 2), (3, 2)),
        ((3, 2, 8), (2, 3), (2, 1)),
    ],
)
def test_shapes_that_differ_are_refused(out_i, lse, lse_i):
    with pytest.raises(ConfigError, match=r"out \(3, 2, 8\).*\[T, H, D\]"):
        merge_state(torch.zeros(3, 2, 8), torch.zeros(lse), torch.zeros(out_i), torch.zeros(lse_i))
