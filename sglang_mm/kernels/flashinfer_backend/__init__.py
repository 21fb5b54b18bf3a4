"""Tile programs by flashinfer.BlockSparseAttentionWrapper: the entries without a mask in one planned call, those with
a mask in a second, the two merged by their log-sum-exp. Large programs take several of each.

The library takes one mask for all heads, so heads become rows (`blocks.py`) and it sees one head. It plans on the host,
and so waits for the device: plans are kept and used again while tables are equal (`plan_cache.py`). On sm_90 its calls
without a mask run on wgmma; those with one run on its older kernel, as they do on all other devices.

Results of a call are of the dtype of q, 16 bits, before they enter the fp32 state. Where a call has too few rows for
the device, the library cuts them over keys, and rounds the parts to 16 bits as well.

T rows, K keys of a piece, Hq query heads, D head dim; S slots (a tile of rows and a head), R rows of a slot, M = S * R,
N keys of all K/V heads in the order of tiles, V rows of M that are merged at once.
"""

import importlib.util
import math
import os
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sglang_mm.kernels.flashinfer_backend.plan import Call, Numbers, Plan
from sglang_mm.kernels.flashinfer_backend.plan_cache import forget_plans, plan_of
from sglang_mm.kernels.merge import merge
from sglang_mm.kernels.packing import Packer
from sglang_mm.kernels.problem import Problem
from sglang_mm.types import TileProgram

__all__ = ["NAME", "attend", "forget_plans", "unfit"]
NAME = "flashinfer"
HEAD_DIMS = (64, 128, 256)  # those for which the library's wgmma kernels and its others both exist
MERGED_AT_ONCE = 1 << 17  # rows: bounds the copies of the state, 64 MiB each with 128 numbers of fp32


def unfit(problem: Problem) -> str | None:
    """None where `attend` can run the problem, else why not, in one line."""
    if problem.capability < 80:
        return f"{problem.name}: FlashInfer needs a CUDA device of sm_80 or later"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"{problem.dtype}: FlashInfer takes float16 and bfloat16"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim {problem.head_dim}: FlashInfer takes {', '.join(map(str, HEAD_DIMS))}"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if not _has_kernels():
        return "FlashInfer compiles its kernels at first use: neither nvcc nor flashinfer-jit-cache is there"
    return _import_failure()


def attend(
    q_THD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    program: TileProgram,
    scale: float,
    out: Tensor,
    lse: Tensor,
    packer: Packer | None = None,
) -> None:
    """Add the program's result to the state. Waits for the device when it meets the program first, and not after that.

    q_THD [T, Hq, D], k_KHD and v_KHD [K, Hkv, D]: float16 or bfloat16, on one CUDA device.
    out fp32 [T, Hq, D], lse fp32 [Hq, T], natural: as `kernels.merge` has them, changed in place.
    Raises ConfigError for programs with more masks or blocks than `plan.py` allows.
    """
    head_dim = q_THD.shape[2]
    plan = plan_of(program, Numbers(q_THD.device, q_THD.dtype, k_KHD.shape[1], head_dim, scale))
    if not plan.calls:
        return

    def by_head() -> list[Tensor]:
        return [each.transpose(0, 1).index_select(1, plan.index).reshape(-1, 1, head_dim) for each in (k_KHD, v_KHD)]

    k_N1D, v_N1D = (packer or Packer(k_KHD, v_KHD)).once(program, "heads", by_head)
    for call in plan.calls:
        q_SRD = q_THD[plan.rows_TR[call.tile_S], call.head_S[:, None]]
        partial = call.wrapper.run(q_SRD.reshape(-1, 1, head_dim), k_N1D, v_N1D, return_lse=True)
        _merge_rows(plan, call, *partial, out, lse)


def _merge_rows(plan: Plan, call: Call, out_M1D: Tensor, log2_M1: Tensor, out: Tensor, lse: Tensor) -> None:
    """Into the state. log2_M1: the log-sum-exp to base 2.

    Rows that see no key are left out by number: some releases give them a finite log-sum-exp.
    """
    rows = plan.rows_TR.shape[1]
    for kept in call.kept.split(MERGED_AT_ONCE):
        slot = kept // rows
        row, head = plan.rows_TR[call.tile_S[slot], kept % rows], call.head_S[slot]
        out_V1D, lse_1V = out[row, head].unsqueeze(1), lse[head, row].unsqueeze(0)
        merge(out_V1D, lse_1V, out_M1D[kept], log2_M1[kept].T * math.log(2))
        out[row, head], lse[head, row] = out_V1D.squeeze(1), lse_1V.squeeze(0)


@cache
def _import_failure() -> str | None:
    try:
        import flashinfer  # noqa: F401
    except Exception as error:  # it compares versions of its wheels while it is imported, and raises what it likes
        return f"flashinfer cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _has_kernels() -> bool:
    """As far as can be told without compiling: where the library looks for nvcc, and the wheel that needs none."""
    if importlib.util.find_spec("flashinfer_jit_cache") or shutil.which("nvcc"):
        return True
    return any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")) or Path("/usr/local/cuda").exists()
