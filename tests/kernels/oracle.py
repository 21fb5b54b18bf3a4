"""Dense softmax attention, as plain as it can be written, and the tolerance that follows from it."""

import torch
from torch import Tensor


def dense(q, k, v, pos_q, pos_k, scale) -> tuple[Tensor, Tensor]:
    """(out [Tq, Hq, D], lse [Hq, Tq]) in the dtype of q; K/V heads repeated, all scores at once."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    visible = pos_k.to(q.device)[None, :] <= pos_q.to(q.device)[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1))
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def exact(q, k, v, pos_q, pos_k, scale) -> tuple[Tensor, Tensor]:
    """The fp64 result for these inputs."""
    return dense(q.double(), k.double(), v.double(), pos_q, pos_k, scale)


def tolerances(expected, q, k, v, pos_q, pos_k, scale, dtype, merges) -> tuple[float, float]:
    """Largest errors allowed in (out, lse) of a kernel that computes in `dtype` and merges `merges` partial results.

    Twice the error of dense attention in that dtype, since tiles are summed in another order; and one rounding of the
    largest score and value in the kernel and in each merge. A score off by d moves the weights by a factor 1 + d, and
    the log-sum-exp by d. The error of fp64 dense attention is that of fp32, scaled by the ratio of their roundings.
    """
    single = torch.float32 if dtype == torch.float64 else dtype
    scaled = torch.finfo(dtype).eps / torch.finfo(single).eps
    same_dtype = dense(q.to(single), k.to(single), v.to(single), pos_q, pos_k, scale)
    out_error, lse_error = (2 * scaled * _largest(a - b) for a, b in zip(same_dtype, expected))
    roundings = (1 + merges) * torch.finfo(dtype).eps
    score = _largest(q) * _largest(k) * q.shape[2] ** 0.5 * scale
    out, lse = map(_largest, expected)
    return out_error + roundings * out * (1 + score), lse_error + roundings * (lse + score)


def assert_matches(actual: tuple[Tensor, Tensor], q, k, v, pos_q, pos_k, scale, merges=1) -> None:
    """Compare a kernel's (out, lse) with fp64 dense attention of the same inputs."""
    expected = exact(q, k, v, pos_q, pos_k, scale)
    allowed = tolerances(expected, q, k, v, pos_q, pos_k, scale, actual[0].dtype, merges)
    for name, got, want, limit in zip(("out", "lse"), actual, expected, allowed):
        assert got.shape == want.shape, f"{name}: {got.shape}, not {want.shape}"
        assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any(), f"{name}: rows without keys"
        error = _largest(got.double() - want)
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


def _largest(values: Tensor) -> float:
    """Largest magnitude, rows without keys (-inf, or -inf - -inf) left out."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
