"""Selection, rows and a piece of keys to tile programs. Vectorised; the same on CPU and CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import BLOCK, Selection, check_fits
from sglang_mm.patterns.program.live import hide_blocks
from sglang_mm.patterns.program.reaches import Runs, find_runs, find_visits
from sglang_mm.patterns.program.rows import Rows, gather_rows
from sglang_mm.patterns.program.shard import Shard
from sglang_mm.patterns.program.shifts import gather_shifts
from sglang_mm.patterns.program.sources import Raw, key_tiles
from sglang_mm.types import TileProgram


def compile_rows(
    selection: Selection, rows: Shard, *, tile: int = BLOCK, sparse_rows: bool = False
) -> tuple[Rows, ...]:
    """What the rows of a rank look for, whatever piece comes by. tile: rows per tile.

    sparse_rows: rows that a pattern makes dense are treated as the others, as the recall guard needs it.
    Raises ConfigError for a tile size outside 1 .. 128, or a selection that does not fit the prompt or these rows.
    """
    _check(tile)
    for unit in selection.units:
        for panel in unit.panels:
            check_fits(panel.chosen, rows.tokens)
    return gather_rows(selection, rows, tile, sparse_rows), *gather_shifts(selection, rows, tile, sparse_rows)


def compile_piece(rows: Sequence[Rows], keys: Shard, *, tile: int = BLOCK) -> tuple[TileProgram, ...]:
    """The programs of these rows over one piece of keys. tile: keys per tile, 1 .. 128.

    Raises ConfigError for a tile size outside that, or keys of another prompt.
    """
    _check(tile)
    for each in rows:
        if each.shard.tokens is not keys.tokens:
            given = f"rows of a prompt of {len(each.shard.tokens)} tokens, keys of another of {len(keys.tokens)}"
            raise ConfigError(given, "rows and keys of one token map", "make both shards from the same map")
    return tuple(_compile(each, keys, tile) for each in rows)


def _check(tile: int) -> None:
    if not 1 <= tile <= BLOCK:
        raise ConfigError(f"a tile of {tile}", f"1 .. {BLOCK}", "64 and 128 are what kernels are made for")


def _compile(rows: Rows, keys: Shard, tile: int) -> TileProgram:
    tiles = key_tiles(rows.sources, keys, tile)
    runs, run_of = find_runs(rows.reaches, rows.order, keys, tiles)
    live = torch.zeros(0, 2, dtype=torch.int64, device=runs.item.device)
    lists = [runs]
    if len(rows.visits.item):
        raw = sum(isinstance(source, Raw) for source in rows.sources)
        seen, visits = find_visits(rows.visits, rows.bounds, keys, tiles, raw)
        beside = rows.beside.index_select(0, runs.bounds)
        if bool(beside.any()):
            lists, live = hide_blocks(runs, run_of, beside, visits, tiles, keys)
        lists.append(seen)
    full = [_full_entries(each) for each in lists]
    part = [_partial_entries(each) for each in lists]
    items = len(rows.item_unit)
    full_ptr, (full_tile, full_count) = _interleave([each[0] for each in full], [each[1:] for each in full], items)
    part_ptr, (part_tile, part_count, part_bounds, part_live) = _interleave(
        [each[0] for each in part], [each[1:] for each in part], items
    )
    return TileProgram(
        pos_q=rows.shard.positions,
        pos_k=keys.positions,
        heads=rows.heads,
        group=rows.group,
        rows=rows.tiles.index,
        row_ptr=rows.tiles.ptr,
        keys=tiles.index,
        key_ptr=tiles.ptr,
        item_unit=rows.item_unit.int(),
        item_rows=rows.item_rows.int(),
        full_ptr=full_ptr,
        full_tile=full_tile,
        full_count=full_count,
        part_ptr=part_ptr,
        part_tile=part_tile,
        part_count=part_count,
        part_bounds=part_bounds,
        part_live=part_live,
        bounds=rows.bounds.int(),
        live=live,
    )


def _full_entries(runs: Runs) -> tuple[Tensor, ...]:
    """(item, tile, count), in order of items."""
    some = (runs.full_stop > runs.full).nonzero().flatten()
    item, full, stop = (each.index_select(0, some) for each in (runs.item, runs.full, runs.full_stop))
    return item, full, stop - full


def _partial_entries(runs: Runs) -> tuple[Tensor, ...]:
    """(item, tile, count, bounds, live): what lies before and after the full run, side by side to keep the order."""
    tile = torch.stack([runs.start, runs.full_stop], 1).flatten()
    count = torch.stack([runs.full, runs.stop], 1).flatten() - tile
    some = (count > 0).nonzero().flatten()
    run = some // 2
    item, bounds, live = (each.index_select(0, run) for each in (runs.item, runs.bounds, runs.live))
    return item, tile.index_select(0, some), count.index_select(0, some), bounds, live


def _interleave(item: Sequence[Tensor], tables: Sequence[Sequence[Tensor]], items: int) -> tuple[Tensor, list[Tensor]]:
    """(ptr int64 [items + 1], columns int32) of lists in order of items: an item's entries come side by side."""
    ends = [torch.cumsum(torch.bincount(each, minlength=items), 0) for each in item]
    starts = [torch.cat([end.new_zeros(1), end]) for end in ends]
    places = []
    for number, each in enumerate(item):
        place = torch.arange(len(each), device=each.device)
        for other, start in enumerate(starts):
            if other != number:  # what earlier lists have up to this item, what later ones have before it
                place = place + start.index_select(0, each + 1 if other < number else each)
        places.append(place)
    columns = []
    for parts in zip(*tables):
        column = torch.empty(sum(map(len, parts)), dtype=torch.int32, device=parts[0].device)
        for place, part in zip(places, parts):
            column[place] = part.int()
        columns.append(column)
    return sum(starts), columns
