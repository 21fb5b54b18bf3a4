"""From tensors and a program to launches of the attention kernel.

T rows, K keys of the piece, N packed keys, Hq query heads, Hkv K/V heads, D head dim.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_mm.kernels.causal import causal_program
from sglang_mm.kernels.merge import empty_state
from sglang_mm.kernels.packing import Packed, Packer
from sglang_mm.kernels.problem import Problem, capability_of
from sglang_mm.kernels.triton_backend.attention import attend_kernel, join_kernel
from sglang_mm.kernels.triton_backend.configs import (
    JOIN_ROWS,
    JOIN_WARPS,
    LARGEST_HEAD,
    TILE,
    Config,
    choose_config,
    padded,
)
from sglang_mm.kernels.triton_backend.works import make_works
from sglang_mm.types import TileProgram

NAME = "triton"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
INTERPRETED = not isinstance(attend_kernel, triton.runtime.jit.JITFunction)


def unfit(problem: Problem) -> str | None:
    """Why the kernel cannot run here; None where it can."""
    if problem.device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, not {problem.device.type} (on CPU: Triton's interpreter, TRITON_INTERPRET=1)"
    if 0 < problem.capability < 80:
        return f"needs sm_80 or later, not {problem.name}"
    if problem.dtype not in DTYPES or (INTERPRETED and problem.dtype == torch.bfloat16):
        return f"does not take {problem.dtype}" + (" in the interpreter" if INTERPRETED else "")
    if problem.head_dim % 8 or not 0 < problem.head_dim <= LARGEST_HEAD:
        return f"takes head dims that are multiples of 8 up to {LARGEST_HEAD}, not {problem.head_dim}"
    return None


def attend(
    q_THD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    program: TileProgram,
    scale: float,
    out_THD: Tensor,
    lse_HT: Tensor,
    packer: Packer | None = None,
) -> None:
    """Merge the program's result into the state, fp32, contiguous, in place. scale > 0. Never waits for the device."""
    attend_packed(q_THD, packer or Packer(k_KHD, v_KHD), program, scale, out_THD, lse_HT)


def attend_packed(
    q_THD: Tensor,
    packer: Packer,
    program: TileProgram,
    scale: float,
    out_THD: Tensor | None,
    lse_HT: Tensor,
    align: int = 1,
) -> None:
    """The same, where another kernel has packed already. align: as for `packing_order`; runs of full entries must then
    end with their only short tile, since its padding has no mask. out_THD None: the log-sum-exp alone."""
    if program.items and program.entries:
        with torch.cuda.device_of(q_THD):  # Triton launches on the current device
            _launch(q_THD, packer, program, scale, out_THD, lse_HT, align)


def attend_causal(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pos_q: Tensor, pos_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `sglang_mm.kernels.causal_attention`."""
    device, kv_heads = q_THD.device, k_THD.shape[1]
    program = causal_program(pos_q.to(device), pos_k.to(device), kv_heads, q_THD.shape[1] // kv_heads)
    out_THD, lse_HT = empty_state(q_THD)
    attend_packed(q_THD, Packer(k_THD, v_THD), program, scale, out_THD, lse_HT)
    return out_THD, lse_HT


def add_lse(q_THD: Tensor, k_KHD: Tensor, program: TileProgram, scale: float, lse_HT: Tensor) -> None:
    """The same for the log-sum-exp alone; values are not needed."""
    attend_packed(q_THD, Packer(k_KHD, None), program, scale, None, lse_HT)


def _launch(q_THD, packer: Packer, program: TileProgram, scale: float, out_THD, lse_HT, align: int) -> None:
    head_dim, width = q_THD.shape[2], padded(q_THD.shape[2])
    config = choose_config(capability_of(q_THD.device), q_THD.dtype, head_dim)
    order, packed = packer.pack(program, align)
    works = make_works(program, order, config.keys, _processors(q_THD.device))
    heads, subtiles = works.unit_heads.shape[1], TILE // config.rows
    slot_lse = lse_HT.new_empty(works.slots * TILE)
    slot_out = None if out_THD is None else lse_HT.new_empty(len(slot_lse), width)
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    state = (lse_HT if out_THD is None else out_THD, lse_HT, lse_HT if slot_out is None else slot_out, slot_lse)
    rows = (program.rows, program.row_ptr, program.item_unit, program.item_rows, works.unit_heads)
    out_row = 0 if out_THD is None else out_THD.stride(0)
    shape = {"heads": heads, "D": head_dim, "E": width, "LSE_ONLY": out_THD is None}
    attend_kernel[(len(works.item) * heads * subtiles,)](
        q_THD, *_keys(packed, config, width), *state,
        program.pos_q, order.pos, *rows, works.item, works.slot, works.full, works.part,
        works.full_entries.key, works.full_entries.stop, works.full_entries.end,
        works.part_entries.key, works.part_entries.stop, works.part_entries.end,
        _one_more(program.part_bounds), _one_more(program.part_live), _one_more(program.bounds), program.live,
        q_THD.stride(0), q_THD.stride(1), packed.k_NHD.stride(0), packed.k_NHD.stride(1), out_row, lse_HT.stride(0),
        scale * LOG2_E,
        **shape, GROUP=program.group, BM=config.rows, BN=config.keys, SUBTILES=subtiles,
        TMA=config.tma, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    join_kernel[(len(works.split_item) * heads * (TILE // JOIN_ROWS),)](
        *state, *rows, works.split_item, works.split_slots, out_row, lse_HT.stride(0),
        **shape, BM=JOIN_ROWS, SUBTILES=TILE // JOIN_ROWS, num_warps=JOIN_WARPS,
    )  # fmt: skip


def _keys(packed: Packed, config: Config, width: int) -> tuple:
    values = packed.k_NHD if packed.v_NHD is None else packed.v_NHD
    if not config.tma:
        return packed.k_NHD, values
    return tuple(TensorDescriptor.from_tensor(each, [config.keys, 1, width]) for each in (packed.k_NHD, values))


def _one_more(table: Tensor) -> Tensor:
    """The kernel looks one entry ahead."""
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])])


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
