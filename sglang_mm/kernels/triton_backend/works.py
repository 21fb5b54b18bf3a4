"""A program's tables as the kernel reads them: entries in visits, items in works. On the device, without waiting.

    item    [ full visits 0 .. 9 | partial visits 10 .. 13 ]      visit: BN keys of an entry
    works   [ 0 .. 6 ] [ 7 .. 13 ]                                an item longer than a fair share is split

Works are in the order in which the device takes them up: parts of split items first, longest first; then unit by unit,
so that what runs at a time shares its K and V in the cache, and in each unit the longest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sglang_mm.kernels.packing import Order
from sglang_mm.types import TileProgram

SHARES = 4
"""Shares per processor: no work is longer than 1 / (4 * processors) of all visits, or SHORTEST."""
SHORTEST = 16
"""Visits of the shortest part: below that, writing and joining partial results would cost more than it balances."""


@dataclass(frozen=True, eq=False)
class Entries:
    """int32, one more than there are, since the kernel looks ahead. key, stop: packed rows [key, stop).

    end: visits of the item's entries up to and with this one. begin [items + 1], end64 [entries + 1]: running counts.
    """

    key: Tensor
    stop: Tensor
    end: Tensor
    begin: Tensor
    end64: Tensor

    @property
    def visits(self) -> Tensor:
        """int64 [items]."""
        return self.begin.diff()


@dataclass(frozen=True, eq=False)
class Works:
    """W works; S split items at most, known without asking the device: rows beyond the real ones have item -1.

    unit_heads int32 [units, heads]: -1 where a unit has fewer. item, slot int32 [W]: slot is -1 for whole items.
    full, part int32 [W, 4]: entry, first visit, last visit, first visit of that entry; counted within the item.
    A work takes a slot for each of its unit's heads. split_item int32 [S]; split_slots int32 [S, 3]: first slot, one
    past the last, heads. slots: how many there can be.
    """

    full_entries: Entries
    part_entries: Entries
    unit_heads: Tensor
    item: Tensor
    slot: Tensor
    full: Tensor
    part: Tensor
    split_item: Tensor
    split_slots: Tensor
    slots: int


def make_works(program: TileProgram, packing: Order, step: int, processors: int) -> Works:
    """packing: in which order the program is packed. step: keys a visit. processors: of the device.

    The program has an item at least.
    """
    full = _entries(program.full_ptr, program.full_tile, program.full_count, packing, step)
    part = _entries(program.part_ptr, program.part_tile, program.part_count, packing, step)
    unit_heads = heads_of_units(program.heads, program.rows.device)
    unit = program.item_unit.long()
    heads = (unit_heads >= 0).sum(1)[unit]
    visits = full.visits + part.visits
    pieces, length = _split(visits, heads, SHARES * processors)
    order = torch.argsort(torch.where(pieces > 1, -visits - (1 << 60), (unit << 40) - visits), stable=True)
    most = SHARES * processors // min(map(len, program.heads))  # extra parts, and split items: the heads share visits
    end = torch.cumsum(pieces[order], 0)
    begin = end - pieces[order]
    number = torch.arange(program.items + most, device=order.device)
    place = torch.searchsorted(end, number, right=True)
    is_work, place = place < program.items, place.clamp(max=program.items - 1)
    item = order[place]
    nth = number - begin[place]
    first = nth * length[item]
    last = torch.minimum(first + length[item], visits[item])
    whole = full.visits[item]
    slots = (pieces * heads)[order]
    slot = torch.cumsum(slots, 0) - slots
    split = order[: most + 1]
    return Works(
        full_entries=full,
        part_entries=part,
        unit_heads=unit_heads,
        item=item.where(is_work, -1).int(),
        slot=(slot[place] + nth * heads[item]).where(is_work & (pieces[item] > 1), -1).int(),
        full=_ranges(full, item, torch.minimum(first, whole), torch.minimum(last, whole)),
        part=_ranges(part, item, (first - whole).clamp(min=0), (last - whole).clamp(min=0)),
        split_item=split.where(pieces[split] > 1, -1).int(),
        split_slots=torch.stack([slot, slot + slots, heads[order]], 1)[: most + 1].int(),
        slots=2 * SHARES * processors,
    )


@lru_cache(maxsize=4096)
def heads_of_units(heads: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int32 [units, most heads], padded by -1. Kept, since a copy from the host would wait for the device; and
    many, since a plan may group the heads of each layer in its own way."""
    most = max(map(len, heads), default=1)
    rows: Sequence[tuple[int, ...]] = [unit + (-1,) * (most - len(unit)) for unit in heads]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, most)


def _entries(ptr: Tensor, tile: Tensor, count: Tensor, packing: Order, step: int) -> Entries:
    tile, items = tile.long(), len(ptr) - 1
    key = packing.start[tile]
    stop = torch.maximum(packing.stop[tile + count], key)  # an entry may have no tile
    end64 = torch.nn.functional.pad(torch.cumsum((stop - key + step - 1) // step, 0), (1, 0))
    begin = end64[ptr]
    item = torch.arange(items, device=ptr.device).repeat_interleave(ptr.diff(), output_size=len(tile))
    within = end64[1:] - begin[item]
    return Entries(*(torch.nn.functional.pad(each, (0, 1)).int() for each in (key, stop, within)), begin, end64)


def _split(visits: Tensor, heads: Tensor, shares: int) -> tuple[Tensor, Tensor]:
    """(parts int64 [items], visits per part): as equal as can be, none longer than a share. Items without any: 0."""
    share = (((visits * heads).sum() + shares - 1) // shares).clamp(min=SHORTEST)
    parts = (visits + share - 1) // share
    return parts, (visits + parts - 1) // parts.clamp(min=1)


def _ranges(entries: Entries, item: Tensor, first: Tensor, last: Tensor) -> Tensor:
    base = entries.begin[item]
    entry = torch.searchsorted(entries.end64[1:], base + first, right=True)
    return torch.stack([entry, first, last, entries.end64[entry] - base], 1).int()
