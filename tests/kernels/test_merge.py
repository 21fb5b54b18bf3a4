"""merge: partial results of disjoint keys become the result of all keys."""

import pytest
import torch

from sglang_mm.kernels import empty_state, merge
from tests.kernels.merging import DTYPES, EMPTY, SIZES, Case, assert_merged, draw
from tests.kernels.oracle import assert_matches, dense

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
ROWS, HEADS, DIM, KEYS = 13, 3, 20, 256
EVERYWHERE = torch.arange(KEYS, KEYS + ROWS)


def inputs(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, HEADS, DIM, generator=draw, dtype=torch.float64) for n in (ROWS, KEYS, KEYS))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
def test_pieces_merge_to_the_whole(dtype, pieces):
    q, k, v = inputs(dtype)
    state = empty_state(q)
    for keys in torch.randperm(KEYS, generator=torch.Generator().manual_seed(pieces)).tensor_split(pieces):
        merge(*state, *dense(q, k[keys], v[keys], EVERYWHERE, keys, 0.3))
    assert_matches(state, q, k, v, EVERYWHERE, torch.arange(KEYS), 0.3, merges=pieces)


def test_a_side_without_keys_changes_nothing():
    q, k, v = inputs(torch.float64)
    whole = dense(q, k, v, EVERYWHERE, torch.arange(KEYS), 0.3)
    for into, other in ((empty_state(q), whole), ([part.clone() for part in whole], empty_state(q))):
        merge(*into, *other)
        for got, want in zip(into, whole):
            torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


def test_two_sides_without_keys_stay_empty():
    out, lse = empty_state(torch.zeros(ROWS, HEADS, DIM))
    merge(out, lse, *empty_state(torch.zeros(ROWS, HEADS, DIM)))
    assert torch.equal(out, torch.zeros(ROWS, HEADS, DIM))
    assert torch.equal(lse, torch.full((HEADS, ROWS), float("-inf")))


def test_rows_without_keys_beside_rows_with_keys():
    q, k, v = inputs(torch.float64)
    early = torch.arange(ROWS) * 40 - 100  # the first rows lie before every key
    state = empty_state(q)
    for keys in torch.arange(KEYS).tensor_split(4):
        merge(*state, *dense(q, k[keys], v[keys], early, keys, 0.3))
    assert state[1].isinf().any()
    assert_matches(state, q, k, v, early, torch.arange(KEYS), 0.3)


@pytest.mark.parametrize("lse, lse_i, share", [(3e4, -3e4, 1.0), (-3e4, 3e4, 0.0), (3e4, 3e4, 0.5), (-3e4, -3e4, 0.5)])
def test_far_apart_scores_do_not_overflow(lse, lse_i, share):
    state = torch.ones(1, 1, 4), torch.tensor([[lse]])
    merge(*state, torch.zeros(1, 1, 4), torch.tensor([[lse_i]]))
    assert torch.equal(state[0], torch.full((1, 1, 4), share))
    assert state[1].item() == pytest.approx(max(lse, lse_i), abs=1)


def test_the_state_is_changed_in_place():
    q, k, v = inputs(torch.float32)
    out, lse = empty_state(q)
    partial = dense(q[4:9], k, v, EVERYWHERE[4:9], torch.arange(KEYS), 0.3)
    merge(out[4:9], lse[:, 4:9], *partial)
    assert torch.equal(out[4:9], partial[0])
    assert not out[:4].any() and not out[9:].any() and lse[:, :4].isinf().all() and lse[:, 9:].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_partial_results_of_every_dtype(size, dtype):
    case = draw(*size, dtype)
    state = case.to("cpu")
    merge(*state)
    assert_merged(state[:2], case)


def test_what_the_kernel_takes():
    """What it does not take is merged by torch."""
    takes = pytest.importorskip("sglang_mm.kernels.triton_backend.merge").takes
    case = draw(3, 2, 8)
    assert takes(*case) and takes(*draw(3, 2, 8, torch.bfloat16)) and takes(*draw(3, 2, 1))
    assert not takes(*(tensor.double() for tensor in case))
    for name in ("lse", "lse_i", "out_i"):
        assert not takes(*case._replace(**{name: getattr(case, name).double()}))
    assert not takes(*case._replace(out_i=case.out_i.transpose(0, 2).contiguous().transpose(0, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, (4100, 32, 128)], ids=str)
def test_on_a_gpu(size, dtype):
    """Rows that need not be read hold NaN, which torch's merge would spread: so this is the kernel."""
    case = draw(*size, dtype)
    given = case.poisoned().to("cuda")
    merge(*given)
    assert_merged(given[:2], case)


@pytest.mark.gpu
def test_fp64_on_a_gpu():
    case = Case(*(tensor.double() for tensor in draw(37, 3, 80)))
    state, want = case.to("cuda"), case.to("cpu")
    merge(*state)
    merge(*want)
    torch.testing.assert_close(state.out.cpu(), want.out, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(state.lse.cpu(), want.lse, rtol=1e-14, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_numbers_than_int32_counts_on_a_gpu():
    """The last rows of 2^31 and some numbers; 13 GB. No other row has keys."""
    rows, heads, dim = 2**21 + 5, 8, 128
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GB of GPU memory are free")
    case = draw(64, heads, dim, torch.bfloat16)
    out = torch.empty(rows, heads, dim, device="cuda")
    out_i = torch.empty(rows, heads, dim, device="cuda", dtype=torch.bfloat16)
    lse, lse_i = torch.full((2, heads, rows), EMPTY, device="cuda")
    out[-64:], lse[:, -64:], out_i[-64:], lse_i[:, -64:] = case.to("cuda")
    merge(out, lse, out_i, lse_i)
    assert_merged((out[-64:], lse[:, -64:]), case)
    assert lse[:, :-64].isneginf().all()
