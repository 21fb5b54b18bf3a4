"""Tile programs on CPU by PyTorch's flash kernel: one call per item, over the keys of its tiles side by side.

    packed copy, by head   [ tiles 0 .. 8 | tiles 9 .. 12 | 13 .. ]
    keys of an item        [ full runs: ranges of it | keys with a mask, one by one ]
    mask of an item          0                         -inf where bounds or bits hide the key

A key with a mask is seen by rows at first <= pos_q < stop: all its bounds, and the bits, are in these two numbers.
T rows, N packed keys, Hq query heads, Hkv K/V heads, D head dim; of an item H heads, R rows, M keys with a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.kernels.merge import merge
from sglang_mm.kernels.packing import Order, Packer, packing_order
from sglang_mm.kernels.problem import Problem
from sglang_mm.types import INF, TileProgram

NAME = "cpu"
ITEMS_AT_ONCE = 256
"""Items whose masks are prepared together: bounds the tables of their keys."""


def unfit(problem: Problem) -> str | None:
    """None where `attend` can run the problem, else why not."""
    if problem.device.type != "cpu":
        return f"runs on CPU, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32, and float64 stays with the reference"
    return None


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
    """Merge the program's result into the state, fp32, in place. 16-bit inputs are widened, as in `cpu_flash`."""
    packed = (packer or Packer(k_KHD, v_KHD)).once(program, NAME, lambda: _pack(k_KHD, v_KHD, packing_order(program)))
    q_HTD = q_THD.transpose(0, 1).float().contiguous()
    out_i, lse_i = torch.zeros_like(q_HTD), torch.full_like(lse, float("-inf"))
    heads_U = [torch.tensor(unit) for unit in program.heads]
    for unit, rows, keys in _items(program, packed.order):
        heads, kv_head = heads_U[unit][:, None], program.heads[unit][0] // program.group
        q_HRD = q_HTD[heads, rows]
        k_ND, v_ND = (_beside(each[kv_head], keys) for each in (packed.k_HND, packed.v_HND))
        hidden_RM = keys.hidden_from(program.pos_q[rows])
        out_i[heads, rows], lse_i[heads, rows] = _flash(q_HRD, k_ND, v_ND, hidden_RM, scale)
    merge(out, lse, out_i.transpose(0, 1), lse_i)


@dataclass(frozen=True, eq=False)
class _Packed:
    """k_HND, v_HND fp32 [Hkv, N, D], contiguous."""

    order: Order
    k_HND: Tensor
    v_HND: Tensor


@dataclass(frozen=True, eq=False)
class _Keys:
    """Of one item, or of some. full: ranges of packed keys. place, first, stop int64 [M]: of keys with a mask."""

    full: list[tuple[int, int]]
    place: Tensor
    first: Tensor
    stop: Tensor

    def hidden_from(self, pos_R: Tensor) -> Tensor:
        """bool [R, M]."""
        return (pos_R[:, None] < self.first).logical_or_(pos_R[:, None] >= self.stop)


def _pack(k_KHD: Tensor, v_KHD: Tensor, order: Order) -> _Packed:
    k_HND, v_HND = (each.transpose(0, 1).index_select(1, order.index).float() for each in (k_KHD, v_KHD))
    return _Packed(order, k_HND, v_HND)


def _items(program: TileProgram, order: Order) -> Iterator[tuple[int, Tensor, _Keys]]:
    """(unit, rows int64 [R], keys) of each item with keys."""
    units, tiles = program.item_unit.tolist(), program.item_rows.tolist()
    row_ptr, full_ptr, part_ptr = (each.tolist() for each in (program.row_ptr, program.full_ptr, program.part_ptr))
    full = _ranges(order, program.full_tile, program.full_count)
    full = list(zip(*(each.tolist() for each in full)))
    for begin in range(0, program.items, ITEMS_AT_ONCE):
        end = min(begin + ITEMS_AT_ONCE, program.items)
        masked, ends = _masked(program, order, slice(part_ptr[begin], part_ptr[end]))
        for item in range(begin, end):
            at = slice(*(ends[part_ptr[each] - part_ptr[begin]] for each in (item, item + 1)))
            keys = _Keys(full[full_ptr[item] : full_ptr[item + 1]], masked.place[at], masked.first[at], masked.stop[at])
            if keys.full or len(keys.place):
                tile = tiles[item]
                yield units[item], program.rows[row_ptr[tile] : row_ptr[tile + 1]].long(), keys


def _ranges(order: Order, tile: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """int64: packed rows [first, stop) of runs of tiles."""
    first = order.start[tile.long()]
    return first, torch.maximum(order.stop[tile.long() + count], first)


def _masked(program: TileProgram, order: Order, entries: slice) -> tuple[_Keys, list[int]]:
    """All keys of these entries with a mask, one entry after another; and where each begins, and the last one ends."""
    begin, stop = _ranges(order, program.part_tile[entries], program.part_count[entries])
    size = stop - begin
    ends = torch.nn.functional.pad(size.cumsum(0), (1, 0))
    entry = torch.arange(len(size)).repeat_interleave(size)
    nth = torch.arange(len(entry)) - ends[entry]
    place = begin[entry] + nth
    low, high, k_low, k_high = program.bounds[program.part_bounds[entries].long()].long()[entry].unbind(1)
    pos_k, live = order.pos[place].long(), program.part_live[entries].long()[entry]
    shown = (pos_k >= k_low) & (pos_k < k_high)
    if len(program.live):
        bits = program.live[live.clamp(min=0), nth.clamp(max=127) // 64] >> nth % 64 & 1
        shown &= (live < 0) | (bits == 1)
    return _Keys([], place, (pos_k + low).where(shown, INF), pos_k + high), ends.tolist()


def _beside(x_ND: Tensor, keys: _Keys) -> Tensor:
    """Those rows of x; a view where they are one range."""
    parts = [x_ND[first:stop] for first, stop in keys.full]
    if len(keys.place):
        parts.append(x_ND.index_select(0, keys.place))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash(q_HRD: Tensor, k_ND: Tensor, v_ND: Tensor, hidden_RM: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [H, R, D], lse [H, R]); hidden: of the last M keys."""
    mask, masked = None, hidden_RM.shape[1]
    if masked:
        mask = q_HRD.new_zeros(len(hidden_RM), len(k_ND))
        mask[:, -masked:].masked_fill_(hidden_RM, float("-inf"))
    k, v = (each.expand(1, len(q_HRD), -1, -1) for each in (k_ND, v_ND))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q_HRD[None], k, v, 0.0, False, attn_mask=mask, scale=scale)
    out, lse = out[0], lse[0]
    if masked == len(k_ND):
        blind = hidden_RM.all(1)  # the kernel's lse is 0 there
        out[:, blind], lse[:, blind] = 0, float("-inf")
    return out, lse
