"""Cases of merge, and how exact their result must be. out [T, H, D], lse [H, T]; `_i`: the side that is added."""

from typing import NamedTuple

import torch
from torch import Tensor

from sglang_mm.kernels import merge

EMPTY = float("-inf")
SIZES = [(1, 1, 64), (16, 2, 64), (37, 3, 80), (33, 2, 96), (70, 5, 128), (19, 2, 20), (3, 1, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    out: Tensor
    lse: Tensor
    out_i: Tensor
    lse_i: Tensor

    def to(self, device) -> "Case":
        return Case(*(tensor.to(device, copy=True) for tensor in self))

    def poisoned(self) -> "Case":
        """NaN in the rows that need not be read: of a side without keys, where the other side has some.

        Where both have none, out is part of the result: it stays 0. out_i has no such rows.
        """
        case = self.to(self.out.device)
        lone, lone_i = case.lse.T == EMPTY, case.lse_i.T == EMPTY
        case.out[lone & ~lone_i] = float("nan")
        case.out_i[lone_i] = float("nan")
        return case


def draw(rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Random results; a quarter of either side has no keys, and some rows differ by more than fp32 can show."""
    generator = torch.Generator().manual_seed(seed)
    out, out_i = torch.randn(2, rows, heads, dim, generator=generator)
    lse, lse_i = 4 * torch.randn(2, heads, rows, generator=generator)
    lse[torch.rand(heads, rows, generator=generator) < 0.1] += 60
    empty, empty_i = torch.rand(2, heads, rows, generator=generator) < 0.25
    lse[empty], lse_i[empty_i] = EMPTY, EMPTY
    out[empty.T], out_i[empty_i.T] = 0, 0
    return Case(out, lse, out_i.to(dtype), lse_i)


def merged_exactly(case: Case) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64, by the torch code."""
    out, lse, out_i, lse_i = (tensor.double().cpu() for tensor in case)
    merge(out, lse, out_i, lse_i)
    return out, lse


def assert_merged(actual: tuple[Tensor, Tensor], case: Case, label: str = "") -> None:
    """Compare an fp32 kernel's (out, lse) with the exact merge of `case`, which has no NaN.

    Let u = 2^-24 and d <= 0 the smaller lse minus the larger. The larger weight is exactly 1. The smaller, w = exp(d),
    is at worst 2^(d log2 e), with roundings of d, log2 e and their product, and an exp2 of 2 ulp: 3u|d| + 4u relative,
    below 5.2u absolute, since |d| exp(d) <= 1/e. So s = 1 + w is off by 5.2u + us. A division adds 2 ulp: 1 / s is off
    by (5.2 + s)u / s^2 + 4u / s, and w / s by 5.2u / s + w (5.2 + s)u / s^2 + 4uw / s; together most at s = 1: 15.4u.
    Products and their sum add 2u. Together below 18u = 9 eps, of the larger value.
    lse = top + log(s): 6.2u of s, 2u of log, which is below 0.7, and u|lse| of the sum: below (5 + |lse| / 2) eps.
    """
    exact, eps = merged_exactly(case), torch.finfo(torch.float32).eps
    largest = torch.maximum(case.out.abs().amax(-1, True), case.out_i.float().abs().amax(-1, True)).double().cpu()
    limits = 9 * eps * largest, (5 + exact[1].abs().nan_to_num(posinf=0) / 2) * eps
    for name, got, want, limit in zip(("out", "lse"), actual, exact, limits):
        got = got.double().cpu()
        assert torch.equal(got == EMPTY, want == EMPTY) and not got.isnan().any(), f"{label} {name}: rows without keys"
        error = (got - want).nan_to_num(nan=0).abs()  # -inf - -inf
        assert (error <= limit).all(), f"{label} {name}: {(error - limit).max():.2e} beyond the limit"
