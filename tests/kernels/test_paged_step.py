"""A decode step over sharded K/V has no wait for the device and no shape that depends on numbers, so that a CUDA graph
can hold it: it runs on fake CUDA tensors, which have shapes and no numbers, up to the launches of the kernels.
"""

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from sglang_mm.kernels import PageTable, join_partials, merge_partials, paged_attention, problem
from sglang_mm.kernels.triton_backend import launch, paged
from sglang_mm.kernels.triton_backend import merge as by_triton
from sglang_mm.types import Residence
from tests.kernels.paged_cases import SCALE, assert_exact, draw

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS, PAGE, B, HEADS, KV_HEADS, D, CONTEXT = 4, 64, 3, 28, 4, 128, 1 << 20


def write(residence, pools, slots, rows, lengths, k_new, v_new):
    """The new token's keys and values, on the rank that keeps it; others write to the padding page."""
    at = residence.local(slots[rows, lengths - 1]).long()
    for pool, new in zip(pools, (k_new, v_new)):
        pool.index_copy_(0, at, new.to(pool.dtype))


def attend(residence, q, pools, slots, rows, lengths, **how):
    return paged_attention(q, *pools, PageTable(slots, rows, lengths, None, residence), scale=SCALE, **how)


def whole_step(residence, q, pools, slots, rows, lengths, new, backend="auto"):
    """As one rank sees it; what the others send is taken to be what it sends itself, which has the same shape."""
    write(residence, pools, slots, rows, lengths, *new)
    out, lse = attend(residence, q, pools, slots, rows, lengths, backend=backend)
    gathered = [torch.stack([each] * residence.ranks) for each in (out, lse)]
    return merge_partials(*gathered), residence.held(lengths)


class Launches:
    """Stands for a kernel. What it is launched with must fit the kernel's signature."""

    def __init__(self, kernel, seen: list):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launched(*args, num_warps, num_stages=3, **named):
            bound = inspect.signature(self.kernel.fn).bind(*args, **named)
            assert all(isinstance(each, int) for each in grid)
            self.seen.append((self.kernel.fn.__name__, grid, bound.arguments))

        return launched


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, arguments) of each launch. What asks the driver for an H200 is told here."""
    seen = []
    monkeypatch.setattr(paged, "paged_kernel", Launches(paged.paged_kernel, seen))
    monkeypatch.setattr(by_triton, "_join", Launches(by_triton._join, seen))
    monkeypatch.setattr(launch, "_processors", lambda _: 132)
    for module in (problem, paged):
        monkeypatch.setattr(module, "capability_of", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    return seen


def fakes(rows: int = B, dtype: torch.dtype = torch.bfloat16) -> dict:
    pool = torch.empty(CONTEXT // RANKS, KV_HEADS, D, device="cuda", dtype=dtype)
    return {
        "q": torch.empty(rows, HEADS, D, device="cuda", dtype=dtype),
        "pools": (pool, torch.empty_like(pool)),
        "slots": torch.empty(9, CONTEXT, device="cuda", dtype=torch.int32),
        "rows": torch.empty(B, device="cuda", dtype=torch.int64),
        "lengths": torch.empty(B, device="cuda", dtype=torch.int64),
    }


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_decode_step_needs_no_numbers(rank, launches):
    with FakeTensorMode():
        given = fakes()
        new = torch.empty(2, B, KV_HEADS, D, device="cuda", dtype=torch.bfloat16)
        out, held = whole_step(Residence(RANKS, rank, PAGE), **given, new=new)
        assert isinstance(out, FakeTensor) and (out.shape, out.dtype) == ((B, HEADS, D), torch.float32)
        assert isinstance(held, FakeTensor) and held.shape == (B,)
    parts = 22  # 2 instances on each of 132 processors, of 3 rows and 4 K/V heads
    grids = [(name, grid) for name, grid, _ in launches]
    assert grids == [("paged_kernel", (B * KV_HEADS * parts,)), ("_join", (B, HEADS)), ("_join", (B, HEADS))]
    assert [each["parts"] for *_, each in launches] == [parts, parts, RANKS]
    assert (launches[0][2]["offset"], launches[0][2]["SHARE"], launches[0][2]["STEP"]) == (16 * rank, 16, 1)


def test_a_follow_up_needs_no_numbers_either(launches):
    with FakeTensorMode():
        given = fakes(rows=500)
        ptr = torch.empty(B + 1, device="cuda", dtype=torch.int32)
        state = attend(Residence(RANKS, 1, PAGE), **given, queries_ptr=ptr)
        out, lse = join_partials(*(torch.stack([each] * RANKS) for each in state))
        assert (out.shape, lse.shape) == ((500, HEADS, D), (HEADS, 500))
    name, grid, arguments = launches[0]
    assert (name, arguments["tiles"], arguments["STEP"]) == ("paged_kernel", 500 // 16 + B, 16)
    assert grid == (34 * KV_HEADS * arguments["parts"],)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda given: given["lengths"].max().item(),
        lambda given: given["slots"][0, : int(given["lengths"][0])],
        lambda given: attend(Residence(RANKS, 1, PAGE), **given, backend="reference"),
        lambda given: given["slots"][0][given["slots"][0] % PAGE < 16],
    ],
    ids=["a number", "a slice", "the reference", "a selection"],
)
def test_what_would_wait_or_depend_on_numbers_is_seen(wrong, launches):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        wrong(fakes())


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_step_is_right(ranks):
    """With numbers, rank by rank on the CPU: the token that was written last is seen."""
    case = draw(ranks, 4, [25, 9, 13], dtype=torch.float32)
    rows, lengths = case.rows, torch.tensor(case.lengths)
    last = [torch.stack([each[-1] for each in kv]) for kv in (case.keys, case.values)]
    states = []
    for residence, pools in zip(case.residences, case.pools):
        kept = residence.local(case.slots[rows, lengths - 1]).long()
        for pool in pools:
            pool[kept] = float("nan")
        write(residence, pools, case.slots, rows, lengths, *last)
        states.append(attend(residence, case.q, pools, case.slots, rows, lengths))
    assert_exact(join_partials(*(torch.stack(each) for each in zip(*states))), case, merges=ranks)
