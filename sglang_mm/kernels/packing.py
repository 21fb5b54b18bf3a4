"""Keys and values in the order of a program's tiles: the permutation. Kernels then read dense tiles and no index.

    keys of the piece   k0 k1 k2 k3 k4 k5 k6 ..          program.keys: raw source | lines of one class | ...
    packed, align 1     k0 k1 .. k6 | k2 k5 | k1 k4 k6   a run of tiles is one range of rows, start[t] .. start[t + n]
    packed, align 128   each tile from row 128 t on, padded; positions of the padding are INF, so every bound hides it

A line is copied for all K/V heads, though few look at it: lines are short, and one index serves all heads.
K keys of the piece, N packed rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.types import INF, TileProgram


@dataclass(frozen=True, eq=False)
class Order:
    """index int64 [N]: of a key of the piece; pos int32 [N]; start int64 [key tiles + 1]: where tiles begin."""

    index: Tensor
    pos: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """k_NHD, v_NHD [N, Hkv, D]: contiguous copies, dtype of k and v; v_NHD is None where there was no v."""

    k_NHD: Tensor
    v_NHD: Tensor | None


def packing_order(program: TileProgram, align: int = 1) -> Order:
    """Without waiting for the device. align: 1, or 128 for kernels that address tiles by number."""
    if align == 1:
        index = program.keys.long()
        return Order(index, program.pos_k[index].int(), program.key_ptr)
    tiles = len(program.key_ptr) - 1
    place = torch.arange(align, device=program.keys.device)
    at = program.key_ptr[:-1, None] + place
    is_key = (at < program.key_ptr[1:, None]).flatten()
    if not len(program.keys):
        return Order(at.flatten(), at.flatten().int(), program.key_ptr)
    index = program.keys[at.flatten().clamp(max=len(program.keys) - 1)].long()
    pos = program.pos_k[index].int().where(is_key, INF)
    return Order(index, pos, torch.arange(tiles + 1, device=place.device) * align)


def pack(k_KHD: Tensor, v_KHD: Tensor | None, order: Order) -> Packed:
    """Padding holds keys and values of other tiles: finite where those are, and hidden by its position."""
    return Packed(k_KHD.index_select(0, order.index), None if v_KHD is None else v_KHD.index_select(0, order.index))
