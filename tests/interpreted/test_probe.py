"""The probe's kernels in Triton's interpreter, against the plain passes in fp64.

torch.empty is NaN, so what no instance writes shows; NaN lies beside the keys, and in those after the last row.
"""

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from sglang_mm.kernels import probe
from sglang_mm.kernels.triton_backend import probe as passes
from sglang_mm.kernels.triton_backend.probe_kernels import _fixed
from sglang_mm.patterns.catalog import Grid
from sglang_mm.patterns.select.masses import Want, measure_masses
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.types import Modality
from tests.kernels.probing import SCALE, UNITS, assert_lse, assert_masses, draw
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import hold

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NAN, INF = float("nan"), float("inf")
PROT_NONE = 0


@pytest.fixture
def large_steps(monkeypatch):
    """fp32 in the steps of 16-bit floats, which take the interpreter less time."""
    monkeypatch.setattr(passes, "FP32", passes.TWO_HEADS)


def check(case) -> None:
    assert_lse(passes.row_lse(*case.inputs, scale=SCALE), case)
    assert_masses(passes.key_masses(*case.inputs, case.lse_HR, scale=SCALE, by_class=case.by_class), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("group", UNITS)
def test_values(group, dim, dtype, large_steps):
    check(draw(group, dim, 150 + group, dtype=dtype))


@pytest.mark.parametrize(
    "config", [passes.ONE_HEAD, passes.TWO_HEADS, passes.FP32, passes._Config(4, 32, 8, 2)], ids=str
)
def test_every_configuration(config, monkeypatch):
    monkeypatch.setattr(passes, "FP32", config)
    check(draw(7, 64, 100, dtype=torch.float32))


@pytest.mark.parametrize(
    "keys, rows, first",
    [(131, 17, None), (90, 1, None), (70, 64, 0), (70, 5, 10_000), (128, 64, 1000), (3, 64, 1), (0, 64, 7), (1, 1, 3)],
)
def test_sizes(keys, rows, first, large_steps):
    """Most keys before the rows, all among them, all before them, few or none; whole steps and broken ones."""
    check(draw(4, 33, keys, rows, torch.float32, first))


@pytest.mark.parametrize("first", range(62, 66))
def test_a_step_that_row_0_sees_all_of_but_one_key(first, large_steps):
    """A step is 64 keys: all of the first, one less, and what lies beside these."""
    check(draw(1, 16, 128, 64, torch.float32, first, has_gaps=False))


def test_parts(large_steps):
    """Three parts of keys, the last of them after the rows, are joined; what comes after the rows changes no bit."""
    case = draw(4, 16, 2300, dtype=torch.float32, first=2000)
    check(case)
    seen = int((case.pos_k < case.rows.stop).sum())
    assert 1024 < seen < 2048 - 64
    less = replace(case, k_KGD=case.k_KGD[:seen], pos_k=case.pos_k[:seen])
    whole, cut = (passes.row_lse(*each.inputs, scale=SCALE)[case.heads] for each in (case, less))
    assert torch.equal(whole, cut)


def guarded(x: torch.Tensor, readable: int) -> torch.Tensor:
    """A copy of x, of whose first dimension no more than `readable` can be read: the next page ends the process."""
    page, size = mmap.PAGESIZE, x[:readable].nbytes
    before, after = (-(-each // page) * page for each in (size, x.nbytes - size + 1))
    memory = mmap.mmap(-1, before + after)
    flat = torch.frombuffer(memory, dtype=x.dtype)
    guard = ctypes.c_void_p(flat.data_ptr() + before)
    first = (before - size) // x.element_size()
    flat[first:][: x[:readable].numel()] = x[:readable].flatten()
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(after), PROT_NONE) == 0
    return flat[first:][: x.numel()].view(x.shape)


def test_keys_after_the_last_row_are_not_read(large_steps):
    """Nor anything after the last key."""
    case = draw(4, 16, 150, rows=20, dtype=torch.float32, first=110)
    seen, counts = int((case.pos_k < case.rows.stop).sum()), case.by_class
    assert 64 < seen < 128
    k, pos_k = guarded(case.k_KGD.contiguous(), seen), guarded(case.pos_k, 150)
    counts = replace(counts, key_item=guarded(counts.key_item, 150), key_class=guarded(counts.key_class, 150))
    there = replace(case, k_KGD=k, pos_k=pos_k, by_class=counts)
    assert_lse(passes.row_lse(*there.inputs, scale=SCALE), case)
    assert_masses(passes.key_masses(*there.inputs, there.lse_HR, scale=SCALE, by_class=counts), case)


def test_keys_in_any_layout(large_steps):
    """Heads before keys, and a head dim that is not dense."""
    case = draw(4, 16, 90, dtype=torch.float32)
    for k_KGD in (case.k_KGD.transpose(0, 1).contiguous().transpose(0, 1), case.k_KGD.mT.contiguous().mT):
        check(replace(case, k_KGD=k_KGD))


def test_a_negative_scale_and_a_large_one(large_steps):
    case = draw(4, 16, 90, dtype=torch.float32)
    for scale in (-SCALE, 0.0, 300 * SCALE):
        lse_HR = passes.row_lse(*case.inputs, scale=scale)
        double = case.to(torch.float64)
        expected = probe.row_lse(*double.inputs, scale=scale)[case.heads]
        tolerance = 2**-24 * (40 * float(expected[expected.isfinite()].abs().max()) + 200)
        torch.testing.assert_close(lse_HR[case.heads].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "poison",
    [
        lambda q, k: k[40].fill_(NAN),
        lambda q, k: q[7, 1].fill_(NAN),
        lambda q, k: k[40].fill_(INF),
        lambda q, k: k[40].fill_(-INF),
        lambda q, k: k[:80].fill_(-INF),
        lambda q, k: q[7, 1].fill_(INF),
        lambda q, k: k[100].fill_(NAN),
    ],
    ids=["key NaN", "row NaN", "key inf", "key -inf", "first keys -inf", "row inf", "key among rows NaN"],
)
@pytest.mark.parametrize("rows", [64, 20])
def test_infinite_and_undefined_scores(poison, rows, large_steps):
    """As in the plain passes in fp32: the same places are NaN, infinite, and neither. Of one unit of all heads."""
    case = draw(4, 16, 150, rows, torch.float32, first=110)
    q, k = case.q_RHD.abs(), case.k_KGD.nan_to_num(nan=0).abs()
    assert case.rows[0] < case.pos_k[100] < case.rows[-1]
    poison(q, k)
    case = replace(case, q_RHD=q, k_KGD=k, units=[(0, 1, 2, 3)])
    lse_HR = passes.row_lse(*case.inputs, scale=SCALE)[:4]
    expected_HR = probe.row_lse(*case.inputs, scale=SCALE)
    assert_alike(lse_HR, expected_HR[:4])
    assert not expected_HR[:4].isfinite().all() or k.isneginf().any()
    masses = passes.key_masses(*case.inputs, expected_HR, scale=SCALE)
    expected = probe.key_masses(*case.inputs, expected_HR, scale=SCALE)
    assert_alike(masses.columns, expected.columns)
    assert_alike(masses.early, expected.early)


def assert_alike(actual, expected) -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_selection_measures_alike(monkeypatch, large_steps):
    """Probe and masses of a prompt with two frame sizes, by the kernels and by plain torch, both in fp32.

    By `assert_lse` and `assert_masses`, with sums of |q| |k| up to 14 and log-sum-exps up to 10, each is off by less
    than 2^-24 (14 * 37 + 300) = 4.9e-5: the log-sum-exps absolutely, masses relatively.
    """
    tokens = token_map(Text(30), Media(4, 3, 5, newline=True), Text(5), Media(9, 4, 6, before=2), Text(20))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(tokens), heads, 16, generator=generator) for heads in (6, 2))
    held, units = hold(q, k, tokens, SCALE), [(0, 1), (2,), (5,)]
    assert SCALE * float((q.abs().flatten(0, 1) @ k.abs().flatten(0, 1).T).max()) < 14
    wants = [
        Want(0, None, Grid(slash=1, sink=0, window=1)),
        Want(2, Modality.VIDEO, Grid(slash=2, sink=130, window=40)),
    ]
    found = []
    for kernels in (None, passes):
        monkeypatch.setattr(probe, "_triton_passes", lambda _, kernels=kernels: kernels)
        found.append(measure_masses(held, take_probe(held, Modality.VIDEO, units), units, wants))
    plain, ours = found
    torch.testing.assert_close(ours.probe.lse_HR, plain.probe.lse_HR, rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(ours.columns, plain.columns, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.early, plain.early, rtol=1e-4, atol=0)
    assert 1 < float(plain.probe.lse_HR.nan_to_num(1).abs().max()) < 10
    assert list(ours.shifts) == list(plain.shifts) and len(ours.shifts) == 4
    for key, mass in ours.shifts.items():
        assert float((mass - plain.shifts[key]).abs().max()) <= 1e-4 * float(plain.shifts[key].max())
        assert int(mass.max()) > probe.FIXED_POINT / 100


def test_nan_stays_in_the_units_of_its_head(large_steps):
    case = draw(4, 16, 90, dtype=torch.float32)
    case.q_RHD[:, 5] = NAN
    lse_HR = passes.row_lse(*case.inputs, scale=SCALE)
    masses = passes.key_masses(*case.inputs, lse_HR, scale=SCALE)
    is_nan = [bool(unit.isnan().any()) for unit in masses.columns]
    assert is_nan == [5 in unit for unit in case.units] and any(is_nan)


def test_equal_probabilities_have_equal_sums(large_steps):
    """Of ones and zeros, which no way to compute a power changes: the whole numbers are the same to the last bit."""
    case = draw(8, 16, 90, dtype=torch.float32)
    case.q_RHD.zero_()
    generator = torch.Generator().manual_seed(0)
    lse_HR = torch.where(torch.rand(case.lse_HR.shape, generator=generator) < 0.5, 0.0, INF)
    share = {"scale": SCALE, "by_class": case.by_class}
    actual, expected = (each.key_masses(*case.inputs, lse_HR, **share) for each in (passes, probe))
    assert all(map(torch.equal, actual, expected))
    assert int(expected.by_class.max()) >= 3 << 40  # the sum over heads of one pair, and over pairs


@triton.jit
def fixed_kernel(P, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(OUT + n, _fixed(tl.load(P + n)))


def test_fixed_point_is_that_of_the_plain_passes():
    """Halves go to even, on both sides of 2^23; numbers that need no rounding; those that fp32 cannot add 2^23 to."""
    halves = (torch.arange(1000) + 0.5) * 2.0**-40
    near = (torch.arange(2**23 - 500, 2**23 + 500) * 2.0**-40).float()
    near_half = torch.nextafter(near, torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.empty(1096).uniform_(-60, 3, generator=generator))
    p = torch.cat([halves, near, near_half, spread]).float()
    out = torch.full((len(p),), -1)
    fixed_kernel[(1,)](p, out, N=len(p))
    assert len(p) == 4096 and torch.equal(out, probe.fixed(p))


def test_control_a_class_count_that_is_off_by_one_place_is_seen(large_steps):
    case = draw(4, 16, 90, dtype=torch.float32)
    masses = passes.key_masses(*case.inputs, case.lse_HR, scale=SCALE, by_class=case.by_class)
    with pytest.raises(AssertionError, match="by_class"):
        assert_masses(masses._replace(by_class=masses.by_class.roll(1, dims=2)), case)
    with pytest.raises(AssertionError, match="early"):
        assert_masses(masses._replace(early=masses.early.roll(1, dims=1)), case)
