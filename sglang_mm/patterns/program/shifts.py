"""Rows of grids with class differences (slash): in order of classes, so that one tile of rows meets few tiles of keys.

Rows of one class of one item attend to keys of another class of the item; what else they see, sink and window and
lines, they see as rows of the main program. Partial results of the two are merged.
P panels, C classes of the axis.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import Marks, Panel, Selection
from sglang_mm.patterns.program.ragged import spread, starts_of, upload
from sglang_mm.patterns.program.reaches import Reaches, limits
from sglang_mm.patterns.program.rows import Rows
from sglang_mm.patterns.program.shard import Shard, Tiles
from sglang_mm.patterns.program.sources import ANY, ByClass, Sources
from sglang_mm.patterns.program.visits import no_visits
from sglang_mm.types import INF, Axis

Numbered = Sequence[tuple[int, Panel]]
"""Panels, each after the number of its unit."""


def gather_shifts(
    selection: Selection, marks: Mapping[Panel, Marks], shard: Shard, tile: int, sparse_rows: bool
) -> Iterator[Rows]:
    """One program for each axis along which any unit has a class difference."""
    panels = [(number, panel) for number, unit in enumerate(selection.units) for panel in unit.panels]
    slashed = [(number, panel) for number, panel in panels if marks[panel].shifts and panel.pattern.slash > 0]
    for axis in Axis:
        here = [(number, panel) for number, panel in slashed if panel.chosen.axis == axis]
        if here:
            yield _rows_of_axis(selection, here, marks, axis, shard, tile, sparse_rows)


def _rows_of_axis(
    selection: Selection, panels: Numbered, marks: Mapping[Panel, Marks], axis: Axis, shard: Shard, tile: int,
    sparse_rows: bool,
) -> Rows:  # fmt: skip
    tiles = shard.by_class(axis, tile)
    device, classes = tiles.first.device, len(shard.tokens.classes(axis))
    unit, limit = upload(
        device,
        [number for number, _ in panels],
        [each for _, panel in panels for each in (panel.pattern.window, INF, panel.pattern.sink, INF)],
    )
    limit = limit.view(-1, 4)
    panel, item_rows = _kept_tiles([panel for _, panel in panels], marks, axis, shard, tiles, sparse_rows)
    item, source = _shifted([panel for _, panel in panels], marks, axis, shard, tiles, panel, item_rows)
    number, row_tile = panel.index_select(0, item), item_rows.index_select(0, item)
    first, last = (each.index_select(0, row_tile) for each in (tiles.first, tiles.last))
    count = len(shard.tokens.grids) * classes
    where = limits(source, count, limit.index_select(0, number).unbind(1), first, last, len(shard.tokens))
    return Rows(
        shard=shard,
        heads=tuple(each.heads for each in selection.units),
        group=selection.group,
        tiles=tiles,
        item_unit=unit.index_select(0, panel).int(),
        item_rows=item_rows.int(),
        sources=Sources([ByClass(axis)], shard.tokens),
        bounds=limit.int(),
        beside=None,
        reaches=Reaches(item=item.int(), bounds=number.int(), **where),
        place=torch.arange(len(item), device=device),
        visits=no_visits(device),
    )


def _table(names: Sequence[Sequence[int]], classes: int, device: torch.device) -> Tensor:
    """bool [P, C]: the classes named for each panel."""
    (marked,) = upload(device, [number * classes + name for number, each in enumerate(names) for name in each])
    table = torch.zeros(len(names) * classes, dtype=torch.bool, device=device)
    table[marked] = True
    return table.view(-1, classes)


def _kept_tiles(
    panels: Sequence[Panel], marks: Mapping[Panel, Marks], axis: Axis, shard: Shard, tiles: Tiles, sparse_rows: bool
) -> tuple[Tensor, Tensor]:
    """(panel, tile of rows), int64: tiles that a panel has, and does not show everything anyway."""
    classes, device = len(shard.tokens.classes(axis)), tiles.first.device
    dense = [() if sparse_rows or not each.pattern.horizontal else marks[each].classes for each in panels]
    kept = ~_table(dense, classes, device).index_select(1, tiles.source % classes)
    if any(panel.rows is not None for panel in panels):
        (rows,) = upload(device, [ANY if panel.rows is None else int(panel.rows) for panel in panels])
        modality = shard.tokens.modality.index_select(0, tiles.first)
        kept &= (rows[:, None] == ANY) | (rows[:, None] == modality)
    found = kept.flatten().nonzero().flatten()
    panel = found // max(1, len(tiles))
    return panel, found - panel * len(tiles)


def _shifted(
    panels: Sequence[Panel], marks: Mapping[Panel, Marks], axis: Axis, shard: Shard, tiles: Tiles, panel: Tensor,
    tile: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(number, source of keys), int64: of each (panel, tile), for each shift of its name space."""
    classes, device = shard.tokens.classes(axis), tiles.first.device
    spaces = range(len(classes.starts) - 1)
    by_space = [
        [shift for space, shift in marks[each].shifts if space == wanted] for each in panels for wanted in spaces
    ]
    starts, counts, firsts, shifts = upload(
        device,
        classes.starts,
        list(map(len, by_space)),
        starts_of(map(len, by_space))[:-1],
        [shift for each in by_space for shift in each],
    )
    source = tiles.source.index_select(0, tile)
    row_class = source % len(classes)
    space = classes.spaces.to(device).index_select(0, row_class)
    place = panel * len(spaces) + space
    count = counts.index_select(0, place)
    total = int(count.sum())
    number = spread(torch.arange(len(count), device=device), count, total)
    offset = firsts.index_select(0, place) - (torch.cumsum(count, 0) - count)
    shift = shifts.index_select(0, offset.index_select(0, number) + torch.arange(total, device=device))
    start, size = starts.index_select(0, space), starts.diff().index_select(0, space)
    start, size, local = (each.index_select(0, number) for each in (start, size, row_class - start))
    key_class = start + (local - shift) % size
    key_source = (source - row_class).index_select(0, number) + key_class
    shown = [marks[each].classes if each.pattern.vertical else () for each in panels]
    if any(shown):
        seen = panel.index_select(0, number) * len(classes) + key_class
        kept = (~_table(shown, len(classes), device).flatten().index_select(0, seen)).nonzero().flatten()
        number, key_source = number.index_select(0, kept), key_source.index_select(0, kept)
    return number, key_source
