"""What a tile program shows, read from its tables alone and not by the kernel that executes it.

T rows, K keys, U units; V visits (a tile of rows meets a tile of keys), R rows and N keys of the widest tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang_mm.types import INF, TileProgram

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class _Visits:
    """int64 [V] each; bounds and live are rows of the program's tables, -1 for none."""

    item: Tensor
    tile: Tensor
    bounds: Tensor
    live: Tensor


def times_shown(program: TileProgram) -> Tensor:
    """uint8 [U, T, K]: how often an entry shows key k to row t of unit u. 1 where the mask is true, 0 elsewhere."""
    counts = torch.zeros(len(program.heads), len(program.pos_q), len(program.pos_k), dtype=torch.uint8)
    for unit, row, key in _pairs(program):
        flat = (unit * counts.shape[1] + row) * counts.shape[2] + key
        counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.uint8))
    return counts


def _pairs(program: TileProgram) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(unit, row, key) of pairs that entries show, int64 each, some visits at a time."""
    rows, keys = _padded(program.rows, program.row_ptr), _padded(program.keys, program.key_ptr)
    bounds = torch.cat([program.bounds.long(), torch.tensor([[-INF, INF, -INF, INF]])])  # the last one: for full visits
    live = torch.cat([_unpacked(program.live), torch.ones(1, 128, dtype=torch.bool)])[:, : keys.shape[1]]
    visits = _visits(program)
    step = max(1, PAIRS_AT_ONCE // max(1, rows.shape[1] * keys.shape[1]))
    for first in range(0, len(visits.item), step):
        at = slice(first, first + step)
        row_VR, key_VN = rows[program.item_rows.long()[visits.item[at]]], keys[visits.tile[at]]
        low, high, k_low, k_high = bounds[visits.bounds[at]].unbind(1)
        pos_VN = program.pos_k[key_VN]
        key_shown_VN = (key_VN >= 0) & live[visits.live[at]]
        key_shown_VN &= (pos_VN >= k_low[:, None]) & (pos_VN < k_high[:, None])
        distance_VRN = program.pos_q[row_VR][:, :, None] - pos_VN[:, None, :]
        shown_VRN = (distance_VRN >= low[:, None, None]) & (distance_VRN < high[:, None, None])
        shown_VRN &= key_shown_VN[:, None, :] & (row_VR >= 0)[:, :, None]
        visit, row, key = shown_VRN.nonzero(as_tuple=True)
        yield program.item_unit.long()[visits.item[at]][visit], row_VR[visit, row], key_VN[visit, key]


def _visits(program: TileProgram) -> _Visits:
    """Runs of tiles, tile by tile: first those of full entries, then those with a mask."""
    none = torch.full_like(program.full_tile, -1)
    runs = (
        (program.full_ptr, program.full_tile, program.full_count, none, none),
        (program.part_ptr, program.part_tile, program.part_count, program.part_bounds, program.part_live),
    )
    found = []
    for ptr, tile, count, bounds, live in runs:
        assert int(ptr[0]) == 0 and int(ptr[-1]) == len(tile) == len(count), "pointers span the table"
        assert bool((count > 0).all()) and bool((count[live >= 0] == 1).all()), (
            "runs have tiles, one where there are bits"
        )
        item = torch.arange(program.items).repeat_interleave(ptr.diff())
        columns = torch.stack([item, tile, bounds, live]).repeat_interleave(count, 1)
        ends = count.cumsum(0)
        columns[1] += torch.arange(columns.shape[1]) - (ends - count).repeat_interleave(count)
        found.append(columns)
    return _Visits(*torch.cat(found, 1))


def _padded(index: Tensor, ptr: Tensor) -> Tensor:
    """int64 [tiles, widest]: the tokens of each tile, then -1."""
    size = ptr.diff()
    place = torch.arange(int(size.max()) if len(size) else 0)
    inside = place < size[:, None]
    table = torch.full(inside.shape, -1)
    table[inside] = index[int(ptr[0]) : int(ptr[-1])].long()
    return table


def _unpacked(live: Tensor) -> Tensor:
    """bool [L, 128] of int64 [L, 2]: the lowest bit of the first word first."""
    octets = live.numpy().astype("<i8").view(np.uint8).reshape(-1, 16)
    return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little")).bool()
