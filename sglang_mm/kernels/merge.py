"""Partial attention results, and how two or more become one. out_THD [T, H, D], lse_HT [H, T], natural logarithm.

State is fp32 (fp64 for fp64 inputs): merging bf16 partials would end 1.4 times further off than one bf16 pass.
A row that saw no key is (0, -inf).
"""

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype partial results of inputs of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have seen no key yet, on the device of the queries."""
    rows, heads, _ = q_THD.shape
    dtype = state_dtype(q_THD.dtype)
    return q_THD.new_zeros(q_THD.shape, dtype=dtype), q_THD.new_full((heads, rows), float("-inf"), dtype=dtype)


def merge(out: Tensor, lse: Tensor, out_i: Tensor, lse_i: Tensor) -> None:
    """Add the partial result (out_i, lse_i) of further keys to (out, lse), in place.

    out, out_i [T, H, D], lse, lse_i [H, T], fp32 or fp64, out_i also fp16 or bf16; the keys of the two must be
    disjoint. Sides without keys are (0, -inf); the result is never NaN, also when both are. An fp32 state on CUDA is
    merged by one kernel, which never reads rows of out_i whose lse_i is -inf.
    """
    if out.is_cuda:
        from sglang_mm.kernels.triton_backend.merge import merge_state, takes  # not at the top: Triton has no CPU

        if takes(out, lse, out_i, lse_i):
            return merge_state(out, lse, out_i, lse_i)
    _merge(out, lse, out_i, lse_i)


def _merge(out: Tensor, lse: Tensor, out_i: Tensor, lse_i: Tensor) -> None:
    top = torch.maximum(lse, lse_i)
    shift = top.masked_fill(top == float("-inf"), 0)  # -inf - -inf would be NaN
    weight, weight_i = torch.exp(lse - shift), torch.exp(lse_i - shift)
    total = weight + weight_i
    share = total.clamp(min=1)  # in [1, 2] where there is a key, 0 where there is none
    out.mul_(_per_row(weight / share)).add_(out_i * _per_row(weight_i / share))
    lse.copy_(shift + torch.log(total))


def merge_partials(outs: Tensor, lses: Tensor) -> Tensor:
    """The result [T, H, D] of partial ones of C disjoint sets of keys: outs [C, T, H, D], lses [C, H, T], as gathered.

    In the dtype of lses. Order and shapes are fixed, so that ranks which hold the same bits get the same bits; nothing
    is waited for. A row that no part has keys for is 0. Raises ConfigError for shapes that do not fit together.
    """
    return join_partials(outs, lses)[0]


def join_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the log-sum-exp [H, T] of all keys, for what is still to be merged."""
    parts, rows, heads, _ = outs.shape
    if not parts or lses.shape != (parts, heads, rows):
        given, allowed = (
            f"outs {tuple(outs.shape)}, lses {tuple(lses.shape)}",
            "outs [C, T, H, D], lses [C, H, T], C > 0",
        )
        raise ConfigError(given, allowed, "stack the results of all ranks, by rank")
    if outs.is_cuda:
        from sglang_mm.kernels.triton_backend.merge import join_parts, takes_parts

        if takes_parts(outs, lses):
            return join_parts(outs, lses)
    return _join(outs, lses)


def _join(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    top = lses.amax(0)
    shift = top.masked_fill(top == float("-inf"), 0)
    weights = torch.exp(lses - shift)
    total = sum(weights[1:], weights[0])
    shares = weights / total.clamp(min=1)  # from 1 on where there is a key, 0 where there is none
    out = outs[0] * _per_row(shares[0])
    for out_i, share in zip(outs[1:], shares[1:]):
        out += out_i * _per_row(share)
    return out, shift + torch.log(total)


def _per_row(weight_HT: Tensor) -> Tensor:
    return weight_HT.T.unsqueeze(-1)
