"""A tile program as a block-sparse matrix: one head, its rows tiles of rows, its columns tiles of keys.

Every query head of an item's unit is a *slot*, a row of blocks of its own, so that heads need not share a mask. Keys
are laid out by K/V head, so the column of a block is kv_head * key tiles + tile. A block that a slot meets is a *page*;
a slot may meet one column several times, with masks that show different keys.

    item 0, heads 2 and 3  -->  slot 0: pages 4 5 9     slot 1: pages 4 5 9
    item 1, head 0         -->  slot 2: pages 0 1

I items, S slots, P pages, V visits (an item meets a tile of keys), R rows and C keys of a block.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.kernels.packing import packing_order
from sglang_mm.types import INF, TileProgram

ROW_STEP = 16  # a block of fewer than 4 rows makes the library take its decode kernel, which has one row per block
KEY_STEP = 8  # so that a row of a block is whole bytes of the packed mask


@dataclass(frozen=True, eq=False)
class Visits:
    """int64 [V] each, ascending by item; bounds and live are rows of the program's tables, -1 for none."""

    item: Tensor
    tile: Tensor
    bounds: Tensor
    live: Tensor

    def take(self, which: Tensor) -> "Visits":
        """which: bool [V], or int64 numbers of visits."""
        return Visits(self.item[which], self.tile[which], self.bounds[which], self.live[which])


@dataclass(frozen=True, eq=False)
class Slots:
    """int64 [S] each, ascending by item: item, query head, and the number of pages."""

    item: Tensor
    head: Tensor
    pages: Tensor

    def part(self, first: int, last: int) -> "Slots":
        at = slice(first, last)
        return Slots(self.item[at], self.head[at], self.pages[at])


class Blocks:
    """Tables of a program in blocks of one size. Making it waits for the device, as its methods do.

    Visits are *whole* where all pairs of a block are seen. All others have a mask: those of entries with bounds, and
    those of full entries whose tile has fewer than C keys.

    rows, keys: R, C. rows_TR int64, is_row_TR bool [row tiles, R]: tiles of rows, padded with rows that exist.
    index int64 [key tiles * C]: the key of the piece at each place of the packed keys, padded likewise.
    """

    def __init__(self, program: TileProgram):
        self.program = program
        self.rows = _rounded(largest(program.row_ptr.diff()), ROW_STEP)
        self.keys = _rounded(largest(program.key_ptr.diff()), KEY_STEP)
        at = program.row_ptr[:-1, None] + torch.arange(self.rows, device=program.rows.device)
        self.is_row_TR = at < program.row_ptr[1:, None]
        self.rows_TR = program.rows[at.clamp(max=len(program.rows) - 1)].long() if len(program.rows) else at
        order = packing_order(program, align=self.keys)
        self.index, self._pos_k_TC = order.index, order.pos.view(-1, self.keys)
        self._is_whole_T = program.key_ptr.diff() == self.keys

    def counts(self) -> tuple[Tensor, Tensor]:
        """How many whole visits, and how many with a mask, each item has: int64 [I]."""
        program = self.program
        before = _sums(self._is_whole_T.long())
        whole = before[(program.full_tile + program.full_count).long()] - before[program.full_tile.long()]
        whole_I, full_I, part_I = (
            _sums(count.long())[ptr].diff()
            for ptr, count in (
                (program.full_ptr, whole),
                (program.full_ptr, program.full_count),
                (program.part_ptr, program.part_count),
            )
        )
        return whole_I, full_I - whole_I + part_I

    def slots(self, count_I: Tensor) -> Slots:
        """Of all items that have visits, as many as said."""
        program, device = self.program, count_I.device
        heads = torch.tensor([head for unit in program.heads for head in unit], device=device, dtype=torch.int64)
        size_U = torch.tensor([len(unit) for unit in program.heads], device=device, dtype=torch.int64)
        unit_I = program.item_unit.long()
        size_I = size_U[unit_I] * (count_I > 0)
        item_S = torch.arange(program.items, device=device).repeat_interleave(size_I)
        place_S = torch.arange(len(item_S), device=device) - _sums(size_I)[item_S]
        return Slots(item_S, heads[_sums(size_U)[unit_I[item_S]] + place_S], count_I[item_S])

    def visits(self, first: int, last: int, *, has_mask: bool) -> Visits:
        """Of items first .. last - 1: those with a mask, or the whole ones."""
        program = self.program
        full = _visits(first, program.full_ptr[first : last + 1], program.full_tile, program.full_count)
        is_whole = self._is_whole_T[full.tile]
        if not has_mask:
            return full.take(is_whole)
        table = program.part_count, program.part_bounds, program.part_live
        part = _visits(first, program.part_ptr[first : last + 1], program.part_tile, *table)
        pairs = zip(vars(full.take(~is_whole)).values(), vars(part).values())
        both = Visits(*(torch.cat(pair) for pair in pairs))
        return both.take(both.item.argsort(stable=True))

    def shown(self, visits: Visits) -> Tensor:
        """bool [V, R, C]: which pairs of these visits are seen. Keys of padding are not; rows of padding may be."""
        program = self.program
        tile_V = program.item_rows.long()[visits.item]
        no_bounds = program.bounds.new_tensor([[-INF, INF, -INF, INF]])
        low, high, k_low, k_high = torch.cat([program.bounds, no_bounds])[visits.bounds].long().unbind(1)
        pos_k_VC = self._pos_k_TC[visits.tile].long()  # INF at padding, which is never < k_high
        shown_VC = (pos_k_VC >= k_low[:, None]) & (pos_k_VC < k_high[:, None]) & self._live_LC[visits.live]
        distance_VRC = program.pos_q[self.rows_TR[tile_V]][:, :, None] - pos_k_VC[:, None, :]
        shown_VRC = (distance_VRC >= low[:, None, None]) & (distance_VRC < high[:, None, None])
        return shown_VRC & shown_VC[:, None, :]

    @cached_property
    def _live_LC(self) -> Tensor:
        """bool [L + 1, C]: the bits of each row of `live`; the last row is for visits without one."""
        live = self.program.live
        place = torch.arange(self.keys, device=live.device)
        bits = (live[:, place // 64] >> place % 64 & 1).bool()
        return torch.cat([bits, bits.new_ones(1, len(place))])


def packed(shown_VRC: Tensor) -> Tensor:
    """uint8 [V, R, C / 8]: eight keys a byte, the lowest bit first."""
    weights = 1 << torch.arange(8, device=shown_VRC.device, dtype=torch.uint8)
    return (shown_VRC.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def largest(sizes: Tensor) -> int:
    return int(sizes.max()) if len(sizes) else 0


def _visits(first: int, ptr: Tensor, tile: Tensor, count: Tensor, *bounds_and_live: Tensor) -> Visits:
    """Runs of tiles, tile by tile. ptr: where the runs of each item begin, from the first item on, and the last end."""
    begin, end = int(ptr[0]), int(ptr[-1])
    tile, count = tile[begin:end].long(), count[begin:end].long()
    item = torch.arange(first, first + len(ptr) - 1, device=ptr.device).repeat_interleave(ptr.diff())
    run = torch.arange(len(tile), device=ptr.device).repeat_interleave(count)
    place = torch.arange(len(run), device=ptr.device) - _sums(count)[run]
    none = torch.full((1,), -1, device=ptr.device).expand(len(run))
    bounds, live = (table[begin:end].long()[run] for table in bounds_and_live) if bounds_and_live else (none, none)
    return Visits(item[run], tile[run] + place, bounds, live)


def _sums(counts: Tensor) -> Tensor:
    """One more than there are counts: the sum of those before each, and of all."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _rounded(size: int, step: int) -> int:
    return max(1, -(-size // step)) * step
