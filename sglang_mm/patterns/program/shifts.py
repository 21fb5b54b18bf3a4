"""Rows of grids with class differences (slash): in order of classes, so that one tile of rows meets few tiles of keys.

Rows of one class of one item attend to keys of another class of the item; what else they see, sink and window and
lines, they see as rows of the main program. Partial results of the two are merged.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Grid
from sglang_mm.patterns.chosen import Panel, Selection
from sglang_mm.patterns.program.reaches import Reaches, Visits, limits
from sglang_mm.patterns.program.rows import Rows
from sglang_mm.patterns.program.shard import Shard, Tiles
from sglang_mm.patterns.program.sources import ByClass
from sglang_mm.types import INF, Axis


def gather_shifts(selection: Selection, shard: Shard, tile: int, sparse_rows: bool) -> Iterator[Rows]:
    """One program for each axis along which any unit has a class difference."""
    panels = [(number, panel) for number, unit in enumerate(selection.units) for panel in unit.panels]
    slashed = [(number, panel) for number, panel in panels if _has_shifts(panel)]
    for axis in Axis:
        here = [(number, panel) for number, panel in slashed if panel.chosen.axis == axis]
        if here:
            yield _rows_of_axis(selection, here, axis, shard, tile, sparse_rows)


def _has_shifts(panel: Panel) -> bool:
    return isinstance(panel.pattern, Grid) and panel.pattern.slash > 0 and len(panel.chosen.shifts) > 0


def _rows_of_axis(selection: Selection, panels, axis: Axis, shard: Shard, tile: int, sparse_rows: bool) -> Rows:
    tiles = shard.by_class(axis, tile)
    device = tiles.first.device
    unit, item_rows, item, source, bounds, limit, items = [], [], [], [], [], [], 0
    for number, (unit_number, panel) in enumerate(panels):
        kept = _kept_tiles(panel, shard, tiles, sparse_rows)
        row, key_source = _shifted(panel, shard, tiles, kept)
        unit.append(torch.full_like(kept, unit_number))
        item_rows.append(kept)
        item.append(row + items)
        source.append(key_source)
        bounds.append(torch.full_like(row, number))
        limit.append([panel.pattern.window, INF, panel.pattern.sink, INF])
        items += len(kept)
    item, number, item_rows = torch.cat(item), torch.cat(bounds), torch.cat(item_rows)
    limit = torch.tensor(limit, dtype=torch.int64, device=device)
    row_tile = item_rows[item]
    prompt = len(shard.tokens)
    where = limits(torch.cat(source), limit[number], tiles.first[row_tile], tiles.last[row_tile], prompt)
    none = item[:0].int()
    return Rows(
        shard=shard,
        heads=tuple(each.heads for each in selection.units),
        group=selection.group,
        tiles=tiles,
        item_unit=torch.cat(unit),
        item_rows=item_rows,
        sources=[ByClass(axis)],
        bounds=limit,
        beside=torch.zeros(len(limit), dtype=torch.bool, device=device),
        reaches=Reaches(item=item.int(), bounds=number.int(), **where),
        order=torch.arange(len(item), device=device, dtype=torch.int32),
        visits=Visits(*[none] * 7),
    )


def _kept_tiles(panel: Panel, shard: Shard, tiles: Tiles, sparse_rows: bool) -> Tensor:
    """int64: tiles of rows that the panel has, and does not show everything anyway."""
    classes = len(shard.tokens.classes(panel.chosen.axis))
    kept = torch.ones(len(tiles), dtype=torch.bool, device=tiles.first.device)
    if panel.rows is not None:
        kept &= shard.tokens.modality[tiles.first] == panel.rows
    if panel.pattern.horizontal and not sparse_rows:
        kept &= ~torch.isin(tiles.source % classes, panel.chosen.classes.to(kept.device))
    return kept.nonzero().flatten()


def _shifted(panel: Panel, shard: Shard, tiles: Tiles, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(place in `kept`, source of keys) of each tile and each shift of its name space, int64, in order of `kept`."""
    classes = shard.tokens.classes(panel.chosen.axis)
    device = tiles.first.device
    starts = torch.tensor(classes.starts, device=device)
    item, row_class = tiles.source[kept] // len(classes), tiles.source[kept] % len(classes)
    space = classes.spaces.to(device)[row_class]
    start, size = starts[space], starts.diff()[space]
    shifts = panel.chosen.shifts.to(device)
    key_class = start[:, None] + (row_class[:, None] - start[:, None] - shifts[None, :, 1]) % size[:, None]
    shown = space[:, None] == shifts[None, :, 0]
    if panel.pattern.vertical:
        shown &= ~torch.isin(key_class, panel.chosen.classes.to(device))
    row, shift = shown.nonzero(as_tuple=True)
    return row, item[row] * len(classes) + key_class[row, shift]
