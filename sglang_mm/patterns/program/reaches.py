"""What items look into, and the runs of tiles that they find there in one piece of keys.

A source's tiles ascend by position, so the tiles that a reach touches are a run, and so are the full ones inside it,
those whose first and last key are within the bounds of every row. Four searches answer all reaches at once, and a tile
of dense rows costs two entries however long the prompt is:

    bounds of all rows            |<----------- full ----------->|
    tiles of the source     | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10| 11| 12|
    entries                 [ partial   ][ full             ][partial]

A visit is about one block of 128 positions, which a table finds without a search.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.ragged import nth, position_of, spread
from sglang_mm.patterns.program.shard import Shard, Tiles
from sglang_mm.patterns.program.sources import Sources
from sglang_mm.types import INF


class Columns:
    """Tensors of one length, side by side."""

    def at(self, index: Tensor):
        return type(self)(*(getattr(self, field.name).index_select(0, index) for field in fields(self)))

    def beside(self, other):
        """These, then the other's."""
        return type(self)(*(torch.cat([getattr(each, field.name) for each in (self, other)]) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Reaches(Columns):
    """In order of bounds, then items: then searches ascend and are four times faster. int32 [reaches].

    item; bounds: row of the table of bounds. first_touched .. last_touched: positions that any row may see, between
    first_full and last_full: that all rows see; each plus the source's number times the length of the prompt + 2, and
    int64 where that needs it.
    first_block, last_block: blocks of first_touched .. last_touched.
    """

    item: Tensor
    bounds: Tensor
    first_touched: Tensor
    last_touched: Tensor
    first_full: Tensor
    last_full: Tensor
    first_block: Tensor
    last_block: Tensor


@dataclass(frozen=True, eq=False)
class Visits(Columns):
    """Blocks that items look into, in order of items. int32 [visits] each.

    source, block; bounds, of which low and k_low matter here; first, last: positions of the item's first and last row.
    lines: the reach of the same item into lines beside the blocks, -1 for none.
    """

    item: Tensor
    source: Tensor
    block: Tensor
    bounds: Tensor
    first: Tensor
    last: Tensor
    lines: Tensor


@dataclass(frozen=True, eq=False)
class Runs(Columns):
    """Tiles [start, stop), of which [full, full_stop) need no mask. In order of items; int32 [runs] each.

    live: row of the table of bits, -1 for none.
    """

    item: Tensor
    bounds: Tensor
    start: Tensor
    stop: Tensor
    full: Tensor
    full_stop: Tensor
    live: Tensor


def limits(
    number: Tensor, count: int, bounds: Sequence[Tensor], first: Tensor, last: Tensor, prompt: int
) -> dict[str, Tensor]:
    """The position columns of Reaches. number: of the source, below `count`; bounds: low, high, k_low, k_high, int64
    [reaches] each; first, last: of the rows."""
    low, high, k_low, k_high = bounds
    touched = torch.maximum(k_low, first - high + 1), torch.minimum(k_high - 1, last - low)
    full = torch.maximum(k_low, last - high + 1), torch.minimum(k_high - 1, first - low)
    base = number * (prompt + 2) + 1
    dtype = torch.int32 if count * (prompt + 2) < INF else torch.int64  # half the time of everything
    names = ("first_touched", "last_touched", "first_full", "last_full")
    placed = {name: (base + at.clamp(-1, prompt)).to(dtype) for name, at in zip(names, (*touched, *full))}
    block = [(at.clamp(0, prompt - 1) // BLOCK).int() for at in touched]
    return placed | {"first_block": block[0], "last_block": block[1]}


def find_runs(reaches: Reaches, place: Tensor, keys: Shard, tiles: Tiles) -> tuple[Runs, Tensor]:
    """The runs of reaches, and int64 [reaches], the run of each one, -1 where it meets nothing of this piece.

    place: int64 [reaches], of each reach when they are in order of items.
    """
    held = keys.blocks_before()
    near = held.index_select(0, reaches.last_block + 1) > held.index_select(0, reaches.first_block)
    index = near.nonzero().flatten()
    base = tiles.source * (len(keys.tokens) + 2) + 1
    small = reaches.first_touched.dtype == torch.int32
    tile_first, tile_last = (
        (base + at).clamp(max=INF).int() if small else base + at for at in (tiles.first, tiles.last)
    )

    def tiles_before(limit: Tensor, table: Tensor, right: bool = False) -> Tensor:
        return torch.searchsorted(table, limit.index_select(0, index), right=right, out_int32=True)

    start = tiles_before(reaches.first_touched, tile_last)
    stop = tiles_before(reaches.last_touched, tile_first, right=True)
    met = (stop > start).nonzero().flatten()
    index, start, stop = (each.index_select(0, met) for each in (index, start, stop))
    full = tiles_before(reaches.first_full, tile_first)
    full_stop = tiles_before(reaches.last_full, tile_last, right=True)
    full_stop = torch.minimum(torch.maximum(full_stop, full), stop)
    none = full == full_stop  # then all of the run is one entry
    full, full_stop = torch.where(none, stop, full), torch.where(none, stop, full_stop)

    is_met = torch.zeros_like(place)
    at = place.index_select(0, index)
    is_met[at] = 1
    run = (torch.cumsum(is_met, 0) - 1).index_select(0, at)
    order = position_of(run)
    run_of = torch.full_like(place, -1)
    run_of[index] = run
    index = index.index_select(0, order)
    item, bounds = (each.index_select(0, index) for each in (reaches.item, reaches.bounds))
    start, stop, full, full_stop = (each.index_select(0, order) for each in (start, stop, full, full_stop))
    return Runs(item, bounds, start, stop, full, full_stop, torch.full_like(start, -1)), run_of


def find_visits(
    visits: Visits, bounds: Tensor, keys: Shard, tiles: Tiles, sources: Sources, tile: int
) -> tuple[Runs, Visits]:
    """One run per tile of each visited block that is in this piece, and the visits to blocks of this piece.

    bounds: int32 [B, 4]. tile: keys of one, at most; raw ones, which alone are visited, lie in one block each.
    """
    held = keys.holds_block() if len(tiles) else torch.zeros_like(keys.holds_block())
    here = visits.at(held.index_select(0, visits.block).nonzero().flatten())
    table = keys.once(("by block", sources.raw, tile), lambda: _tiles_by_block(keys, tiles, len(sources.raw)))
    place = here.source * (len(keys.holds_block()) + 1) + here.block
    number, each = table.index_select(0, place), here
    count = table.index_select(0, place + 1) - number
    seen = count > 0
    if tile < BLOCK:
        total = int(count.sum())
        number = spread(number, count, total) + nth(count, total).int()
        each = here.at(spread(torch.arange(len(count), device=count.device), count, total))
        seen = torch.ones_like(number, dtype=torch.bool)
    low, _, k_low, _ = bounds.index_select(0, each.bounds).unbind(1)
    at = number.clamp(max=len(tiles) - 1)
    first, last = tiles.first.int().index_select(0, at), tiles.last.int().index_select(0, at)
    met = (seen & (last >= k_low) & (each.last - first >= low)).nonzero().flatten()
    is_full = (first >= k_low) & (each.first - last >= low)
    item, bounds, start, is_full = (x.index_select(0, met) for x in (each.item, each.bounds, number, is_full))
    stop = start + 1
    return Runs(item, bounds, start, stop, torch.where(is_full, start, stop), stop, torch.full_like(start, -1)), here


def _tiles_by_block(keys: Shard, tiles: Tiles, sources: int) -> Tensor:
    """int32 [sources * (blocks + 1)]: of each source, how many tiles lie before each block; none lies across two."""
    blocks = len(keys.holds_block()) + 1
    base = torch.arange(sources, device=tiles.first.device)[:, None] * (len(keys.tokens) + 2)
    border = torch.arange(blocks, device=tiles.first.device) * BLOCK
    placed = tiles.source * (len(keys.tokens) + 2) + tiles.first
    return torch.searchsorted(placed, (base + border.clamp(max=len(keys.tokens))).flatten(), out_int32=True)
