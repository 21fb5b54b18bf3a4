"""Cases of the probe's passes, and how far fp32 kernels may be from the fp64 result. Letters as in kernels/probe.py."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sglang_mm.kernels import probe
from sglang_mm.kernels.probe import FIXED_POINT, ClassCounts, KeyMasses

SCALE = 0.3
HALF_EPS = 2.0**-24
UNITS = {
    1: [(0,), (2,), (1,)],  # K/V head 3 has no unit
    4: [(0, 1, 2, 3), (5,), (7, 4)],
    7: [(0, 1, 2, 3, 4, 5, 6), (9, 13, 11)],
    8: [(1,), (3, 0), (2, 4, 5, 6), (7,)],
}
"""By query heads per K/V head."""
HEADS = {1: 4, 4: 8, 7: 14, 8: 8}


@dataclass(frozen=True, eq=False)
class Case:
    q_RHD: Tensor
    k_KGD: Tensor
    pos_k: Tensor
    rows: range
    units: list[tuple[int, ...]]
    lse_HR: Tensor
    by_class: ClassCounts

    @property
    def inputs(self) -> tuple:
        return self.q_RHD, self.k_KGD, self.pos_k, self.rows, self.units

    @property
    def heads(self) -> list[int]:
        """That have a unit."""
        return sorted(head for unit in self.units for head in unit)

    def to(self, *args) -> "Case":
        """To another dtype or device: of q, k and lse; positions and items follow to the device."""
        counts, device = self.by_class, self.q_RHD.to(*args).device
        items = (each.to(device) for each in (counts.row_item, counts.key_item, counts.key_class))
        moved = self.q_RHD.to(*args), self.k_KGD.to(*args), self.pos_k.to(device), self.rows, self.units
        lse = self.lse_HR.double() if moved[0].dtype == torch.float64 else self.lse_HR
        return Case(*moved, lse.to(device), ClassCounts(*items, counts.classes, counts.counts))


def draw(
    group: int,
    dim: int,
    keys: int,
    rows: int = 64,
    dtype: torch.dtype = torch.float64,
    first: int | None = None,
    has_gaps: bool = True,
) -> Case:
    """first: position of row 0; by default most keys are before it, some among the rows and some after them.

    lse is that of keys of which these are a part: a little more than their own. Keys after the last row are NaN, as is
    what lies beside the keys in memory.
    """
    generator = torch.Generator().manual_seed(1000 * group + dim)
    heads = HEADS[group]
    q = torch.randn(rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    beside = torch.full((keys, heads // group, dim + 16), float("nan"), dtype=dtype)
    k = beside[..., :dim]
    k.copy_(torch.randn(keys, heads // group, dim, generator=generator, dtype=torch.float64))
    span = keys + keys // 4 if has_gaps else keys
    pos_k = torch.randperm(span, generator=generator)[:keys].sort().values
    first = max(0, span - rows - 20) if first is None else first
    k[pos_k >= first + rows] = float("nan")
    counts = ClassCounts(
        row_item=torch.randint(-1, 2, (rows,), generator=generator).int(),
        key_item=torch.randint(-1, 2, (keys,), generator=generator).int(),
        key_class=torch.randint(-1, 7, (keys,), generator=generator).int(),
        classes=5,  # 5 and 6 are not counted
        counts=((0, 0, 1), (len(UNITS[group]) - 1, 0, 1), (0, keys // 3, 30)),
    )
    case = Case(q, k, pos_k, range(first, first + rows), UNITS[group], torch.empty(0), counts)
    lse = exact_lse(case)
    lse = torch.where(lse.isfinite(), lse + 0.1, 1.0)
    return Case(*case.inputs, lse.to(torch.float64 if dtype == torch.float64 else torch.float32), counts)


def scores(case: Case) -> Tensor:
    """fp64 [H, R, K], -inf for keys after the row; NaN keys after all rows count as zeros."""
    is_read = case.pos_k < case.rows.stop
    k_KHD = case.k_KGD.double().masked_fill(~is_read[:, None, None], 0)
    k_KHD = k_KHD.repeat_interleave(case.q_RHD.shape[1] // case.k_KGD.shape[1], dim=1)
    scores_HRK = torch.einsum("rhd,khd->hrk", case.q_RHD.double(), k_KHD) * SCALE
    return scores_HRK.masked_fill(case.pos_k > torch.tensor(case.rows)[:, None], float("-inf"))


def exact_lse(case: Case) -> Tensor:
    return torch.logsumexp(scores(case), dim=-1)


def exact_masses(case: Case) -> KeyMasses:
    """From the table of all pairs, in fp64. by_class is fp64 too: of masses that were not rounded."""
    p_HRK = torch.exp(scores(case) - case.lse_HR.double()[:, :, None])
    p_URK = torch.stack([p_HRK[list(unit)].sum(0) for unit in case.units])
    row_R1 = torch.tensor(case.rows)[:, None]
    bins_RK = torch.div(row_R1 - case.pos_k, probe.BIN, rounding_mode="floor")
    counts = case.by_class
    mass_NRC = torch.zeros(len(counts.counts), len(case.rows), counts.classes, dtype=torch.float64)
    for number, (unit, sink, window) in enumerate(counts.counts):
        for klass in range(counts.classes):
            is_counted_RK = (counts.row_item[:, None] == counts.key_item) & (counts.key_item >= 0)
            is_counted_RK &= (counts.key_class == klass) & (case.pos_k >= sink) & (row_R1 - case.pos_k >= window)
            mass_NRC[number, :, klass] = (p_URK[unit] * is_counted_RK).sum(-1)
    return KeyMasses(p_URK.sum(1), (p_URK * (bins_RK == bins_RK[0])).sum(1), mass_NRC * FIXED_POINT)


def assert_lse(actual_HR: Tensor, case: Case, step: int = 64, part: int = 1024) -> None:
    """Compare fp32 log-sum-exps with the exact ones: NaN for heads without a unit, -inf for rows without keys.

    Let u = 2^-24, A the largest sum of |q| |k| times the scale. A score is a sum of D products, off by A D u, or twice
    that where tensor cores cut off; by 2 A u when it is scaled by a rounded number; the difference to the maximum by
    2 A u. Of a sum of powers of two, each off by 4 u, `step` are added at a time, and T sums, each scaled by a power
    of two as far off: 8 u a time. Logarithm, sum and change of base: 8 u of the result, in a part and in joining P.
    """
    keys = len(case.pos_k)
    expected = exact_lse(case)
    steps, parts = -(-min(keys, part) // step), -(-keys // part)
    result = 16 * max(1.0, _largest(expected))
    allowed = (_score_roundings(case) + step + 4 + 8 * (steps + parts) + result) * HALF_EPS
    others = [head for head in range(len(actual_HR)) if head not in case.heads]
    got, want = actual_HR[case.heads].double().cpu(), expected[case.heads]
    assert actual_HR.dtype == torch.float32 and bool(actual_HR[others].isnan().all())
    assert torch.equal(got.isneginf(), want.isneginf()) and not got.isnan().any()
    error = _largest(torch.where(want.isfinite(), got - want, 0))
    assert error <= allowed, f"log-sum-exp: error {error:.2e} > {allowed:.2e}"


def assert_masses(actual: KeyMasses, case: Case) -> None:
    """Compare fp32 masses with the fp64 twin's.

    p is relatively as far off as its exponent is absolutely: the score as above, the log-sum-exp L by its change of
    base, 2 L u, their difference by (A + L) u, the power by 4 u. Sums of 64 rows and up to 8 heads have no signs.
    A sum by class: that, and half a unit for each pair, on both sides. Below 2^-126 nothing is asked of fp32.
    """
    double = case.to(torch.float64)
    expected = probe.key_masses(*double.inputs, double.lse_HR, scale=SCALE, by_class=case.by_class)
    relative = (_score_roundings(case) + 3 * _largest(case.lse_HR) + 4 + 64 + 8) * HALF_EPS
    pairs = int(torch.bincount(case.by_class.key_class.clamp(min=0), minlength=1).max())
    for name, absolute in (("columns", 2.0**-126), ("early", 2.0**-126), ("by_class", pairs)):
        got, want = (getattr(each, name).double().cpu() for each in (actual, expected))
        torch.testing.assert_close(got, want, rtol=relative, atol=absolute, msg=partial("{}: {}".format, name))
    assert actual.columns.dtype == actual.early.dtype == torch.float32 and actual.by_class.dtype == torch.int64


def _score_roundings(case: Case) -> float:
    is_read = case.pos_k < case.rows.stop
    k_KHD = case.k_KGD[is_read].double().abs().repeat_interleave(case.q_RHD.shape[1] // case.k_KGD.shape[1], dim=1)
    largest = _largest(torch.einsum("rhd,khd->hrk", case.q_RHD.double().abs(), k_KHD)) * SCALE
    return largest * (2 * case.q_RHD.shape[2] + 5)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
