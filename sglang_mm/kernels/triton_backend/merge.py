"""The merge of partial results as one kernel: every element that changes is read once and written once.

T rows, H heads, D head dim, N parts; P: D rounded up to a power of two. One instance merges ROWS rows of one head into
a state, or joins all parts of one row of one head, PARTS at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.triton_backend.variant import Variant

ROWS = 16
PARTS = 16
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


def takes_parts(outs: Tensor, lses: Tensor) -> bool:
    """Whether `join_parts` can join these: fp32 log-sum-exp, results of 16 or 32 bits, dense rows of D and of T."""
    are_dense = (outs.shape[-1] < 2 or outs.stride(-1) == 1) and (lses.shape[-1] < 2 or lses.stride(-1) == 1)
    return lses.dtype == torch.float32 and outs.dtype in PARTIAL_DTYPES and are_dense


def join_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """(out fp32 [T, H, D], lse fp32 [H, T]) of outs [N, T, H, D] and lses [N, H, T], as `kernels.merge` joins them.

    The order of additions depends on N alone. Parts whose lse is -inf are never read. Never waits for the device.
    """
    parts, rows, heads, dim = outs.shape
    out = outs.new_empty(rows, heads, dim, dtype=torch.float32)
    lse = lses.new_empty(heads, rows)
    if out.numel():
        with torch.cuda.device_of(out):
            _join[(rows, heads)](
                outs, lses, out, lse, parts, rows, heads,
                outs.stride(0), outs.stride(1), outs.stride(2), lses.stride(0), lses.stride(1),
                D=dim, P=triton.next_power_of_2(dim), PARTS=PARTS, num_warps=WARPS,
            )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["parts", "rows", "heads", "lses_part", "lses_head"])
def _join(
    OUTS, LSES, OUT, LSE, parts, rows, heads, outs_part, outs_row, outs_head, lses_part, lses_head,
    D: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, d = tl.arange(0, PARTS).to(tl.int64), tl.arange(0, P)
    LSES += head * lses_head + row
    OUTS += head * outs_head + row * outs_row
    top = tl.full([PARTS], float("-inf"), tl.float32)
    for first in range(0, parts, PARTS):
        top = tl.maximum(top, tl.load(LSES + (first + n) * lses_part, mask=first + n < parts, other=float("-inf")))
    shift = tl.max(top, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)  # no part has keys: -inf - -inf would be NaN
    total = tl.zeros([PARTS], tl.float32)
    acc = tl.zeros([PARTS, P], tl.float32)
    for first in range(0, parts, PARTS):
        lse = tl.load(LSES + (first + n) * lses_part, mask=first + n < parts, other=float("-inf"))
        weight = tl.exp(lse - shift)
        is_read = (lse != float("-inf"))[:, None] & (d < D)[None, :]
        outs = tl.load(OUTS + (first + n)[:, None] * outs_part + d[None, :], mask=is_read, other=0.0)
        acc += weight[:, None] * outs.to(tl.float32)
        total += weight
    total = tl.sum(total, 0)
    has_keys = total != 0  # true for NaN
    total = tl.where(has_keys, total, 1.0)
    tl.store(OUT + (row * heads + head) * D + d, tl.sum(acc, 0) / total, mask=d < D)
    tl.store(LSE + head * rows + row, tl.where(has_keys, shift + tl.log(total), float("-inf")))


def variants() -> list[Variant]:
    """Every configuration of the kernel that usual models meet: head dims, and the dtypes of partial results."""
    shapes = [(dim, dtype) for dim in (64, 80, 96, 128) for dtype in ("fp32", "bf16")]
    return [_variant(*shape) for shape in shapes] + [_join_variant(128, "fp32"), _join_variant(80, "bf16")]


def _join_variant(dim: int, dtype: str) -> Variant:
    constexprs = {"D": dim, "P": triton.next_power_of_2(dim), "PARTS": PARTS}
    known = {"OUTS": f"*{dtype}"} | dict.fromkeys(constexprs, "constexpr")
    return Variant(
        name=f"join_parts-{dim}" if dtype == "fp32" else f"join_parts-{dim}-{dtype}",
        fn=_join,
        signature={name: known.get(name, "*fp32" if name.isupper() else "i32") for name in _join.arg_names},
        constexprs=constexprs,
        divisible=("OUTS", "LSES", "OUT", "LSE", "outs_part", "outs_row", "outs_head"),
        num_warps=WARPS,
        num_stages=3,
    )


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
