"""The head-dependent half of the compiler: what each tile of rows looks for, whatever piece of keys comes by.

Once per layer and rank. A *group* is a unit's rows that meet its panels alike: all of one modality or all at all, and
of a pattern with dense rows, the dense ones or the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Panel, Selection
from sglang_mm.patterns.program.reaches import Reaches, Visits, limits
from sglang_mm.patterns.program.shard import Seams, Shard, Tiles, nth, spread
from sglang_mm.patterns.program.sources import Source, concatenate, numbered
from sglang_mm.patterns.program.targets import Target, targets_of
from sglang_mm.types import Modality


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one program. Items are in order of units.

    tiles: of rows; item_unit, item_rows: int64 [items]. sources: lists of keys to make of each piece.
    bounds: int64 [B, 4]. beside: bool [B], whether they belong to lines beside blocks. order: int32 [reaches], reaches
    in order of items.
    """

    shard: Shard
    heads: tuple[tuple[int, ...], ...]
    group: int
    tiles: Tiles
    item_unit: Tensor
    item_rows: Tensor
    sources: Sequence[Source]
    bounds: Tensor
    beside: Tensor
    reaches: Reaches
    order: Tensor
    visits: Visits


def gather_rows(selection: Selection, shard: Shard, tile: int, sparse_rows: bool) -> Rows:
    """All rows of all units, with everything but differences of classes.

    sparse_rows: rows that a pattern makes dense are treated as all others are.
    Raises ConfigError when a selection of blocks lacks rows of the shard.
    """
    tile_sets: dict = {}
    groups: list[tuple[int, object]] = []
    targets: list[Target] = []
    for number, unit in enumerate(selection.units):
        for modality in dict.fromkeys(panel.rows for panel in unit.panels):
            panels = [panel for panel in unit.panels if panel.rows == modality]
            for key, tiles, dense in _row_sets(panels, modality, shard, tile, sparse_rows, tile_sets):
                if len(tiles):
                    groups.append((number, key))
                    for panel, is_dense in zip(panels, dense):
                        targets += targets_of(len(groups) - 1, tiles, panel, is_dense)
    return _assemble(selection, shard, tile_sets, groups, targets)


def dense_rows(panel: Panel, shard: Shard, sparse_rows: bool) -> tuple[object, Tensor | bool]:
    """(a key, equal for equal answers; which rows of the shard see everything: bool [N], or all, or none)."""
    pattern, chosen = panel.pattern, panel.chosen
    if isinstance(pattern, Dense):
        return True, True
    if isinstance(pattern, TriShape) and not sparse_rows:
        return ("last", pattern.last), shard.positions >= len(shard.tokens) - pattern.last
    if isinstance(pattern, Grid) and not sparse_rows and (pattern.horizontal or pattern.tail):
        lines = chosen.classes if pattern.horizontal else chosen.classes[:0]
        tail = shard.tokens.tail if pattern.tail else len(shard.tokens)
        on_line = shard.in_classes(chosen.axis, lines) | (shard.positions >= tail)
        return ("grid", chosen.axis, tuple(lines.tolist()), tail), on_line
    return False, False


def _row_sets(panels, modality: Modality | None, shard: Shard, tile: int, sparse_rows: bool, made: dict):
    """Yield (key, tiles, per panel whether these rows are dense) of each group; `made` keeps tiles that units share."""
    keys, lifted = zip(*(dense_rows(panel, shard, sparse_rows) for panel in panels))
    split = [rows for rows in lifted if isinstance(rows, Tensor)]
    for code in range(1 << len(split)):
        bits = iter(range(len(split)))
        dense = [bool(code >> next(bits) & 1) if isinstance(rows, Tensor) else rows for rows in lifted]
        seams = _seams([panel.pattern for panel, is_dense in zip(panels, dense) if not is_dense])
        key = (modality, seams, code, tuple(keys) if split else None)
        if key not in made:
            made[key] = _cut_rows(shard, modality, split, code, tile, seams)
        yield key, made[key], dense


def _seams(sparse: list[Pattern]) -> Seams:
    """Of the rows of a group, given its patterns that are not dense for it. Dense rows have no window to keep small."""
    if any(isinstance(pattern, VerticalSlash | Blocks) for pattern in sparse):
        return Seams.BLOCKS
    return Seams.JUMPS if sparse else Seams.NONE


def _cut_rows(shard: Shard, modality, split: list[Tensor], code: int, tile: int, seams: Seams) -> Tiles:
    if not split:
        return shard.of(modality, tile, seams)
    here = torch.ones_like(split[0]) if modality is None else shard.modality() == modality
    for bit, rows in enumerate(split):
        here &= rows if code >> bit & 1 else ~rows
    return shard.pick(here.nonzero().flatten(), tile, seams)


def _assemble(selection: Selection, shard: Shard, tile_sets: dict, groups: list, targets: list[Target]) -> Rows:
    """Number items and sources, and spell out what each item reaches."""
    device = shard.positions.device

    def column(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    starts = dict(zip(tile_sets, accumulate([0, *map(len, tile_sets.values())])))
    count = column(len(tile_sets[key]) for _, key in groups)
    tiles = concatenate([shard.pick(shard.positions[:0], 1), *tile_sets.values()], [None] * (1 + len(tile_sets)))
    item_rows = spread(column(starts[key] for _, key in groups), count) + nth(count)
    sources, numbers = numbered([target.source for target in targets])
    bounds = column(limit for target in targets for limit in target.bounds).view(-1, 4)
    first_item = (torch.cumsum(count, 0) - count)[column(target.group for target in targets)]
    size = count[column(target.group for target in targets)]
    for i, target in enumerate(targets):
        if target.blocks is not None:
            size[i] = 0

    number, local = spread(torch.arange(len(targets), device=device), size), nth(size)
    item = first_item[number] + local
    row_tile = item_rows[item]
    where = limits(
        column(numbers)[number], bounds[number], tiles.first[row_tile], tiles.last[row_tile], len(shard.tokens)
    )
    return Rows(
        shard=shard,
        heads=tuple(unit.heads for unit in selection.units),
        group=selection.group,
        tiles=tiles,
        item_unit=spread(column(number for number, _ in groups), count),
        item_rows=item_rows,
        sources=sources,
        bounds=bounds,
        beside=torch.tensor([target.beside for target in targets], dtype=torch.bool, device=device),
        reaches=Reaches(item=item.int(), bounds=number.int(), **where),
        order=torch.sort(item, stable=True).indices.int(),
        visits=_visits(targets, numbers, first_item, torch.cumsum(size, 0) - size, item_rows, tiles),
    )


def _visits(
    targets: list[Target], numbers: list[int], first_item: Tensor, start: Tensor, item_rows: Tensor, tiles: Tiles
) -> Visits:
    """first_item, start: int64, of each target, its first item and its first line in Reaches."""
    device = item_rows.device
    listed = [i for i, target in enumerate(targets) if target.blocks is not None]
    count = torch.tensor([targets[i].blocks.shape[1] for i in listed], dtype=torch.int64, device=device)
    has_lines = torch.tensor([i > 0 and targets[i - 1].beside for i in listed], dtype=torch.bool, device=device)
    bounds = torch.tensor(listed, dtype=torch.int64, device=device)
    lines = torch.where(has_lines, start[bounds - 1], -1)
    source = torch.tensor([numbers[i] for i in listed], dtype=torch.int64, device=device)
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    row, block = torch.cat([none, *(targets[i].blocks for i in listed)], 1)
    item = spread(first_item[bounds], count) + row
    lines = spread(lines, count)
    lines = torch.where(lines < 0, lines, lines + row)
    at = item_rows[item]
    first, last = tiles.first[at], tiles.last[at]
    columns = item, spread(source, count), block, spread(bounds, count), first, last, lines
    visits = Visits(*(each.int() for each in columns))
    ascending = bool((item[1:] >= item[:-1]).all())
    return visits if ascending else visits.at(torch.sort(item, stable=True).indices)
