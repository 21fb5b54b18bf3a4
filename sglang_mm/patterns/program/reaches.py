"""What items look into, and the runs of tiles that they find there in one piece of keys.

A source's tiles ascend by position, so the tiles that a reach touches are a run, and so are the full ones inside it,
those whose first and last key are within the bounds of every row. Four searches answer all reaches at once, and a tile
of dense rows costs two entries however long the prompt is:

    bounds of all rows            |<----------- full ----------->|
    tiles of the source     | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10| 11| 12|
    entries                 [ partial   ][ full             ][partial]

A visit is about one block of 128 positions, which a table finds without a search.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.shard import Shard, Tiles, nth, spread
from sglang_mm.types import INF


class Columns:
    """Tensors of one length, side by side."""

    def at(self, index: Tensor):
        return type(self)(*(getattr(self, field.name).index_select(0, index) for field in fields(self)))


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


def limits(number: Tensor, bounds: Tensor, first: Tensor, last: Tensor, prompt: int) -> dict[str, Tensor]:
    """The position columns of Reaches. number: of the source; bounds int64 [reaches, 4]; first, last: of the rows."""
    low, high, k_low, k_high = bounds.unbind(1)
    touched = torch.maximum(k_low, first - high + 1), torch.minimum(k_high - 1, last - low)
    full = torch.maximum(k_low, last - high + 1), torch.minimum(k_high - 1, first - low)
    base = number * (prompt + 2) + 1
    names = ("first_touched", "last_touched", "first_full", "last_full")
    placed = {name: _small(base + at.clamp(-1, prompt)) for name, at in zip(names, (*touched, *full))}
    block = [(at.clamp(0, prompt - 1) // BLOCK).int() for at in touched]
    return placed | {"first_block": block[0], "last_block": block[1]}


def _small(placed: Tensor) -> Tensor:
    """int32 where the values are below INF, which halves the time of everything; int64 else."""
    return placed.int() if not len(placed) or int(placed.max()) < INF else placed


def find_runs(reaches: Reaches, order: Tensor, keys: Shard, tiles: Tiles) -> tuple[Runs, Tensor]:
    """The runs of reaches, and int32 [reaches], the run of each one, -1 where it meets nothing of this piece.

    order: int32 [reaches], reaches in order of items.
    """
    held = keys.blocks_before()
    near = held.index_select(0, reaches.last_block + 1) > held.index_select(0, reaches.first_block)
    index = near.nonzero().flatten().int()
    base = tiles.source * (len(keys.tokens) + 2) + 1
    tile_first, tile_last = base + tiles.first, base + tiles.last

    def tiles_before(limit: Tensor, table: Tensor, right: bool = False) -> Tensor:
        limit = limit.index_select(0, index)
        if limit.dtype == torch.int32:
            table = table.clamp(max=INF).int()
        return torch.searchsorted(table, limit, right=right, out_int32=True)

    start = tiles_before(reaches.first_touched, tile_last)
    stop = tiles_before(reaches.last_touched, tile_first, right=True)
    met = (stop > start).nonzero().flatten()
    index, start, stop = (each.index_select(0, met) for each in (index, start, stop))
    full = tiles_before(reaches.first_full, tile_first)
    full_stop = tiles_before(reaches.last_full, tile_last, right=True)
    full = torch.minimum(torch.maximum(full, start), stop)
    full_stop = torch.minimum(torch.maximum(full_stop, full), stop)
    none = full == full_stop  # then all of the run is one entry
    full, full_stop = torch.where(none, stop, full), torch.where(none, stop, full_stop)

    place = torch.full_like(reaches.item, -1)
    place[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
    place = place.index_select(0, order)
    kept = (place >= 0).nonzero().flatten()
    place, reach = place.index_select(0, kept), order.index_select(0, kept)
    run_of = torch.full_like(reaches.item, -1)
    run_of[reach] = torch.arange(len(reach), dtype=torch.int32, device=reach.device)
    item, bounds = reaches.item.index_select(0, reach), reaches.bounds.index_select(0, reach)
    start, stop, full, full_stop = (each.index_select(0, place) for each in (start, stop, full, full_stop))
    return Runs(item, bounds, start, stop, full, full_stop, torch.full_like(start, -1)), run_of


def find_visits(visits: Visits, bounds: Tensor, keys: Shard, tiles: Tiles, raw: int) -> tuple[Runs, Visits]:
    """One run per tile of each visited block that is in this piece, and the visits to blocks of this piece.

    bounds: int64 [B, 4]. raw: how many of the sources, the first ones, are raw; others are not visited.
    """
    here = visits.at(keys.holds_block().index_select(0, visits.block).nonzero().flatten())
    table = _tiles_by_block(keys, tiles, raw)
    place = here.source * (len(keys.holds_block()) + 1) + here.block
    start = table.index_select(0, place)
    count = table.index_select(0, place + 1) - start
    tile, each = start, here
    if bool((count != 1).any()):
        tile = spread(start, count) + nth(count)
        each = here.at(spread(torch.arange(len(count), device=count.device), count))
    low, k_low = bounds[:, 0].int().index_select(0, each.bounds), bounds[:, 2].int().index_select(0, each.bounds)
    first, last = tiles.first.int().index_select(0, tile), tiles.last.int().index_select(0, tile)
    met = ((last >= k_low) & (each.last - first >= low)).nonzero().flatten()
    full = torch.where((first >= k_low) & (each.first - last >= low), tile, tile + 1)
    runs = Runs(each.item, each.bounds, tile, tile + 1, full, tile + 1, torch.full_like(tile, -1))
    return runs.at(met), here


def _tiles_by_block(keys: Shard, tiles: Tiles, sources: int) -> Tensor:
    """int32 [sources * (blocks + 1)]: of each source, how many tiles lie before each block; none lies across two."""
    blocks = len(keys.holds_block()) + 1
    base = torch.arange(sources, device=tiles.first.device)[:, None] * (len(keys.tokens) + 2)
    border = torch.arange(blocks, device=tiles.first.device) * BLOCK
    placed = tiles.source * (len(keys.tokens) + 2) + tiles.first
    return torch.searchsorted(placed, (base + border.clamp(max=len(keys.tokens))).flatten(), out_int32=True)
