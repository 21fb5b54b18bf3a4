"""The merge of partial results as one kernel: every element that changes is read once and written once.

T rows, H heads, D head dim; P: D rounded up to a power of two. One instance merges ROWS rows of one head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.triton_backend.variant import Variant

ROWS = 16
WARPS = 4
PARTIAL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(out: Tensor, lse: Tensor, out_i: Tensor, lse_i: Tensor) -> bool:
    """Whether `merge_state` can merge these: an fp32 state, a partial result of 16 or 32 bits, dense rows of D."""
    return (
        out.dtype == lse.dtype == lse_i.dtype == torch.float32
        and out_i.dtype in PARTIAL_DTYPES
        and (out.shape[-1] < 2 or out.stride(-1) == out_i.stride(-1) == 1)
    )


def merge_state(out: Tensor, lse: Tensor, out_i: Tensor, lse_i: Tensor) -> None:
    """Add the partial result (out_i, lse_i) to (out, lse), in place, as `kernels.merge.merge` does.

    out fp32, out_i fp32, fp16 or bf16 [T, H, D]; lse, lse_i fp32 [H, T]. Any strides, but D must be dense. Where a side
    is -inf, its rows of out are never read; rows to which nothing is added are never written.
    Raises ConfigError for shapes that differ. Never waits for the device.
    """
    rows, heads, dim = out.shape
    if out_i.shape != out.shape or lse.shape != (heads, rows) or lse_i.shape != lse.shape:
        given = f"out {tuple(out.shape)}, {tuple(out_i.shape)}, lse {tuple(lse.shape)}, {tuple(lse_i.shape)}"
        raise ConfigError(given, "out [T, H, D] and lse [H, T], twice the same", "merge results of the same rows")
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(rows, ROWS), heads)](
            out, lse, out_i, lse_i, rows,
            out.stride(0), out.stride(1), lse.stride(0), lse.stride(1),
            out_i.stride(0), out_i.stride(1), lse_i.stride(0), lse_i.stride(1),
            D=dim, P=triton.next_power_of_2(dim), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _merge(
    OUT, LSE, OUT_I, LSE_I, rows,
    out_row, out_head, lse_head, lse_row, out_i_row, out_i_head, lse_i_head, lse_i_row,
    D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = LSE + head * lse_head + row * lse_row
    lse = tl.load(at, mask=row < rows, other=float("-inf"))
    lse_i = tl.load(LSE_I + head * lse_i_head + row * lse_i_row, mask=row < rows, other=float("-inf"))
    has_keys, adds_keys = lse != float("-inf"), lse_i != float("-inf")

    top = tl.maximum(lse, lse_i)  # -inf where neither side has keys: what follows is NaN there, and is not stored
    weight, weight_i = tl.exp(lse - top), tl.exp(lse_i - top)
    total = weight + weight_i

    d = tl.arange(0, P)
    out_at = OUT + head * out_head + row[:, None] * out_row + d[None, :]
    out_i_at = OUT_I + head * out_i_head + row[:, None] * out_i_row + d[None, :]
    is_added = adds_keys[:, None] & (d < D)[None, :]
    out = tl.load(out_at, mask=is_added & has_keys[:, None], other=0.0)
    out_i = tl.load(out_i_at, mask=is_added, other=0.0).to(tl.float32)
    out = out * (weight / total)[:, None] + out_i * (weight_i / total)[:, None]
    tl.store(out_at, out, mask=is_added)
    tl.store(at, top + tl.log(total), mask=adds_keys)


def variants() -> list[Variant]:
    """Every configuration of the kernel that usual models meet: head dims, and the dtypes of partial results."""
    return [_variant(dim, dtype) for dim in (64, 80, 96, 128) for dtype in ("fp32", "bf16")]


def _variant(dim: int, dtype: str) -> Variant:
    strides = ("out_row", "out_head", "lse_head", "out_i_row", "out_i_head", "lse_i_head")
    return Variant(
        name=f"merge-{dim}" if dtype == "fp32" else f"merge-{dim}-{dtype}",
        fn=_merge,
        signature={
            "OUT": "*fp32", "LSE": "*fp32", "OUT_I": f"*{dtype}", "LSE_I": "*fp32", "rows": "i32",
            "out_row": "i32", "out_head": "i32", "lse_head": "i32", "lse_row": "constexpr",
            "out_i_row": "i32", "out_i_head": "i32", "lse_i_head": "i32", "lse_i_row": "constexpr",
            "D": "constexpr", "P": "constexpr", "ROWS": "constexpr",
        },
        constexprs={"lse_row": 1, "lse_i_row": 1, "D": dim, "P": triton.next_power_of_2(dim), "ROWS": ROWS},
        divisible=("OUT", "LSE", "OUT_I", "LSE_I", *strides),
        num_warps=WARPS,
        num_stages=3,
    )  # fmt: skip
