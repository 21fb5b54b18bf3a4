"""Softmax restricted to a mask, token by token, and how far a tile program may be from it. No tiles here.

S tokens, Hq query heads, D head dim.
"""

import torch
from torch import Tensor

from tests.exactness.layers import SCALE, State


def masked(q: Tensor, k: Tensor, v: Tensor, seen_HSS: Tensor) -> State:
    """(out [S, Hq, D], lse [Hq, S]) in the dtype of q: one softmax over all keys that a row sees."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    scores = scores.masked_fill(~seen_HSS, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1))
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def exact(q: Tensor, k: Tensor, v: Tensor, seen_HSS: Tensor) -> State:
    """The fp64 result for these inputs."""
    return masked(q.double(), k.double(), v.double(), seen_HSS)


def allowed(expected: State, q: Tensor, k: Tensor, v: Tensor, seen_HSS: Tensor, dtype: torch.dtype, merges: int):
    """Largest errors allowed in (out, lse) of `merges` partial results kept in `dtype`, fp32 or fp64.

    Twice the error of the plain computation in that dtype, since tiles are summed in another order, and two roundings
    of the largest value in each merge: 2^-22 in fp32. For fp64, once more the plain error, which the oracle has too.
    The error of the plain fp64 computation is that of fp32, scaled by the ratio of their roundings.
    Of few keys it may be nothing by chance; so once the rounding of the largest score, which the log-sum-exp is off by,
    and the weights as a factor.
    """
    eps = torch.finfo(dtype).eps
    times = 3 if dtype == torch.float64 else 2
    plain = masked(q.float(), k.float(), v.float(), seen_HSS)
    error = [eps / torch.finfo(torch.float32).eps * largest(got.double() - want) for got, want in zip(plain, expected)]
    out, lse = map(largest, expected)
    score = SCALE * largest(q.double().norm(dim=-1)) * largest(k.double().norm(dim=-1))
    merging = merges * 2 * eps
    return [times * error[0] + merging * out + eps * score * out, times * error[1] + merging * lse + eps * score]


def errors(actual: State, expected: State) -> list[float]:
    """Largest error of out and of lse; infinite where something is NaN, or a row with keys is taken for one without."""
    if any(got.isnan().any() or not torch.equal(got.isinf(), want.isinf()) for got, want in zip(actual, expected)):
        return [float("inf")] * 2
    return [largest(got.double() - want) for got, want in zip(actual, expected)]


def assert_exact(actual: State, q: Tensor, k: Tensor, v: Tensor, seen_HSS: Tensor, merges: int) -> None:
    expected = exact(q, k, v, seen_HSS)
    limits = allowed(expected, q, k, v, seen_HSS, actual[0].dtype, merges)
    for name, error, limit in zip(("out", "lse"), errors(actual, expected), limits):
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


def largest(values: Tensor) -> float:
    """Largest magnitude, rows without keys (-inf, or -inf - -inf) left out."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
