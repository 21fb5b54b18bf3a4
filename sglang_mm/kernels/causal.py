"""Causal attention by positions as a tile program, so that kernels for programs compute the dense case too.

Every K/V head is a unit, every 128 rows a tile; each item has one full entry, of the tiles of keys that all its rows
see, and one partial entry, of those that some see. Either may be empty.
"""

import torch
from torch import Tensor

from sglang_mm.types import INF, TileProgram

TILE = 128


def causal_program(pos_q: Tensor, pos_k: Tensor, kv_heads: int, group: int) -> TileProgram:
    """pos_q [T], pos_k [K]: int64, ascending, at least one each, on one device, which is not waited for."""
    rows, keys = _tiles(pos_q), _tiles(pos_k)
    whole = torch.searchsorted(pos_k[keys[1:] - 1], pos_q[rows[:-1]], right=True)
    seen = torch.searchsorted(pos_k[keys[:-1]], pos_q[rows[1:] - 1], right=True)
    tiles = len(rows) - 1
    number = torch.arange(kv_heads * tiles, device=pos_q.device)
    ptr = torch.arange(len(number) + 1, device=pos_q.device)
    none = torch.zeros_like(number).int()
    whole, seen = whole.repeat(kv_heads).int(), seen.repeat(kv_heads).int()
    return TileProgram(
        pos_q=pos_q,
        pos_k=pos_k,
        heads=tuple(tuple(range(first, first + group)) for first in range(0, kv_heads * group, group)),
        group=group,
        rows=torch.arange(len(pos_q), device=pos_q.device).int(),
        row_ptr=rows,
        keys=torch.arange(len(pos_k), device=pos_q.device).int(),
        key_ptr=keys,
        item_unit=(number // tiles).int(),
        item_rows=(number % tiles).int(),
        full_ptr=ptr,
        full_tile=none,
        full_count=whole,
        part_ptr=ptr,
        part_tile=whole,
        part_count=seen - whole,
        part_bounds=none,
        part_live=none - 1,
        bounds=_causal(pos_q.device),
        live=number.new_zeros(0, 2),
    )


def _tiles(pos: Tensor) -> Tensor:
    """int64 [tiles + 1]: borders of tiles of TILE tokens."""
    return torch.arange(0, len(pos) + TILE, TILE, device=pos.device).clamp(max=len(pos))


def _causal(device: torch.device) -> Tensor:
    bounds = torch.zeros(1, 4, dtype=torch.int32, device=device)
    bounds[:, 1::2] = INF
    return bounds
