"""Selection, rows and a piece of keys to tile programs. Vectorised; the same on CPU and CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import BLOCK, Selection, read_marks
from sglang_mm.patterns.program.live import Lists, hide_blocks
from sglang_mm.patterns.program.ragged import borders, position_of
from sglang_mm.patterns.program.reaches import Runs, find_runs, find_visits
from sglang_mm.patterns.program.rows import Rows, gather_rows
from sglang_mm.patterns.program.shard import Shard, Tiles
from sglang_mm.patterns.program.shifts import gather_shifts
from sglang_mm.patterns.program.sources import ColumnLines, key_tiles, raw_tiles
from sglang_mm.types import TileProgram


def compile_rows(
    selection: Selection, rows: Shard, *, tile: int = BLOCK, sparse_rows: bool = False
) -> tuple[Rows, ...]:
    """What the rows of a rank look for, whatever piece comes by. tile: rows per tile.

    sparse_rows: rows that a pattern makes dense are treated as the others, as the recall guard needs it.
    Raises ConfigError for a tile size outside 1 .. 128, or a selection that does not fit the prompt or these rows.
    """
    _check(tile)
    panels = [panel for unit in selection.units for panel in unit.panels]
    marks = dict(zip(panels, read_marks([panel.chosen for panel in panels], rows.tokens)))
    main = gather_rows(selection, marks, rows, tile, sparse_rows)
    return main, *gather_shifts(selection, marks, rows, tile, sparse_rows)


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
    runs, live = _find_all(rows, keys, tiles, tile)
    items = len(rows.item_unit)
    item, full_tile, full_count = _full_entries(runs)
    full_ptr = borders(item, items)
    item, part_tile, part_count, part_bounds, part_live = _partial_entries(runs)
    return TileProgram(
        pos_q=rows.shard.positions,
        pos_k=keys.positions,
        heads=rows.heads,
        group=rows.group,
        rows=rows.tiles.index,
        row_ptr=rows.tiles.ptr,
        keys=tiles.index,
        key_ptr=tiles.ptr,
        item_unit=rows.item_unit,
        item_rows=rows.item_rows,
        full_ptr=full_ptr,
        full_tile=full_tile,
        full_count=full_count,
        part_ptr=borders(item, items),
        part_tile=part_tile,
        part_count=part_count,
        part_bounds=part_bounds,
        part_live=part_live,
        bounds=rows.bounds,
        live=live,
    )


def _find_all(rows: Rows, keys: Shard, tiles: Tiles, tile: int) -> tuple[Runs, Tensor]:
    """All runs of tiles, in order of items, and the bits of keys, int64 [L, 2]."""
    live = torch.zeros(0, 2, dtype=torch.int64, device=tiles.first.device)
    runs, run_of = find_runs(rows.reaches, rows.place, keys, tiles)
    if not len(rows.visits.item):
        return runs, live
    raw = raw_tiles(rows.sources, keys, tile)
    seen, visits = find_visits(rows.visits, rows.bounds, keys, tiles, rows.sources, tile)
    if rows.beside is not None and len(runs.item):
        beside = rows.beside.index_select(0, runs.bounds)
        columns = sum(isinstance(source, ColumnLines) for source in rows.sources)
        lists = Lists(source=len(rows.sources.raw), tile=len(raw), key=len(raw.index), count=columns)
        runs, live = hide_blocks(runs, run_of, beside, visits, tiles, keys, lists)
    return _interleave(runs, seen, len(rows.item_unit)), live


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


def _interleave(runs: Runs, others: Runs, items: int) -> Runs:
    """Both in order of items: an item's runs come side by side."""
    before = borders(others.item, items).index_select(0, runs.item)  # others of earlier items
    after = borders(runs.item, items)[1:].index_select(0, others.item)  # runs up to this item
    count = torch.arange(max(len(before), len(after)), device=before.device)
    place = torch.cat([before + count[: len(before)], after + count[: len(after)]])
    return runs.beside(others).at(position_of(place))
