"""Softmax over what a mask shows, in fp64, and how far a kernel of a given dtype may be from it.

R rows, K keys, Hq query heads, Hkv K/V heads, G = Hq / Hkv, D head dim.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
"""out [R, Hq, D], lse [Hq, R]."""
FP32 = 2.0**-23


def exact(q_RHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, seen_HRK: Tensor, scale: float) -> State:
    """In fp64. seen_HRK: bool, per query head. Rows that see nothing are (0, -inf)."""
    return _masked(q_RHD.double(), k_KHD.double(), v_KHD.double(), seen_HRK, scale, torch.float64)


def allowed(q_RHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, seen_HRK: Tensor, scale: float, want: State, merges: int):
    """Largest errors allowed in (out, lse), as multiples of the error of one dense pass in the dtype of q.

    That pass is what every flash kernel does: scores of the given values in fp32, weights and result rounded to the
    dtype. Twice its largest error, for sums in another order; for each of `merges` merges of partial results two
    roundings of the largest value to fp32; and since the pass may be exact by chance where rows have few keys, one
    rounding of the largest score, which moves the log-sum-exp by as much and the weights by that factor.
    """
    got = _masked(q_RHD.float(), k_KHD.float(), v_KHD.float(), seen_HRK, scale, q_RHD.dtype)
    out, lse = errors(got, want)
    score = FP32 * scale * _largest(q_RHD.double().norm(dim=-1)) * _largest(k_KHD.double().norm(dim=-1))
    largest_out, largest_lse = map(_largest, want)
    merging = 2 * FP32 * merges
    return 2 * out + (merging + score) * largest_out, 2 * lse + merging * largest_lse + score


def errors(got: State, want: State) -> tuple[float, float]:
    """Largest error of out and of lse; infinite where something is NaN, or a row without keys is taken for one with."""
    pairs = list(zip(got, want))
    if any(bool(one.isnan().any()) or not torch.equal(one.isinf(), other.isinf()) for one, other in pairs):
        return float("inf"), float("inf")
    out, lse = (_largest(one.double() - other.double()) for one, other in pairs)
    return out, lse


def _masked(q: Tensor, k: Tensor, v: Tensor, seen_HRK: Tensor, scale: float, rounded: torch.dtype) -> State:
    group = q.shape[1] // k.shape[1]
    k_HKD, v_HKD = (each.repeat_interleave(group, dim=1).transpose(0, 1) for each in (k, v))
    scores_HRK = (q.transpose(0, 1) @ k_HKD.transpose(1, 2) * scale).masked_fill(~seen_HRK, float("-inf"))
    lse_HR = torch.logsumexp(scores_HRK, dim=-1)
    weights_HRK = torch.exp(scores_HRK - lse_HR.masked_fill(lse_HR.isinf(), 0).unsqueeze(-1))
    out_HRD = weights_HRK.to(rounded).to(v.dtype) @ v_HKD
    return out_HRD.transpose(0, 1).to(rounded).to(v.dtype), lse_HR


def _largest(values: Tensor) -> float:
    """Largest magnitude, infinite ones left out."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
