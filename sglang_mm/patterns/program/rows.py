"""The head-dependent half of the compiler: what each tile of rows looks for, whatever piece of keys comes by.

Once per layer and rank. A *group* is a unit's rows that meet its panels alike: all of one modality or all at all, and
of a pattern with dense rows, the dense ones or the others. The host lists groups and targets; tensors hold the tiles
and items of all units together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Blocks, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import Marks, Panel, Selection, Unit
from sglang_mm.patterns.program.ragged import spread, starts_of, upload
from sglang_mm.patterns.program.reaches import Reaches, Visits, limits
from sglang_mm.patterns.program.row_sets import Lifted, RowSet, cut_row_sets, lifted_by
from sglang_mm.patterns.program.shard import Seams, Shard, Tiles
from sglang_mm.patterns.program.sources import Sources, numbered
from sglang_mm.patterns.program.targets import Target, targets_of
from sglang_mm.patterns.program.visits import Look, list_visits
from sglang_mm.types import TokenMap


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one program. Items are in order of units.

    tiles: of rows; item_unit, item_rows: int32 [items]. sources: lists of keys to make of each piece.
    bounds: int32 [B, 4]. beside: bool [B], whether they belong to lines beside blocks; None: none do. place: int64
    [reaches], of each one when they are in order of items.
    """

    shard: Shard
    heads: tuple[tuple[int, ...], ...]
    group: int
    tiles: Tiles
    item_unit: Tensor
    item_rows: Tensor
    sources: Sources
    bounds: Tensor
    beside: Tensor | None
    reaches: Reaches
    place: Tensor
    visits: Visits


@dataclass(frozen=True, eq=False)
class Group:
    """panels: of the rows' modality, each with whether these rows are dense."""

    unit: int
    rows: RowSet
    panels: Sequence[tuple[Panel, bool]]


def gather_rows(selection: Selection, marks: Mapping[Panel, Marks], shard: Shard, tile: int, sparse_rows: bool) -> Rows:
    """All rows of all units, with everything but differences of classes.

    sparse_rows: rows that a pattern makes dense are treated as all others are.
    Raises ConfigError when a selection of blocks lacks rows of the shard.
    """
    groups = [
        group
        for number, unit in enumerate(selection.units)
        for group in _groups(number, unit, marks, shard.tokens, sparse_rows)
    ]
    tiles, tiles_of = cut_row_sets(shard, list(dict.fromkeys(group.rows for group in groups)), tile)
    groups = [group for group in groups if len(tiles_of[group.rows])]
    targets = [
        target
        for number, group in enumerate(groups)
        for panel, is_dense in group.panels
        for target in targets_of(number, panel, marks[panel], is_dense)
    ]
    return _assemble(selection, shard, tiles, groups, [tiles_of[group.rows] for group in groups], targets)


def _groups(
    number: int, unit: Unit, marks: Mapping[Panel, Marks], tokens: TokenMap, sparse_rows: bool
) -> Iterator[Group]:
    for modality in dict.fromkeys(panel.rows for panel in unit.panels):
        panels = [panel for panel in unit.panels if panel.rows == modality]
        lifted = [lifted_by(panel, marks[panel], tokens, sparse_rows) for panel in panels]
        rules = [each for each in lifted if isinstance(each, Lifted)]
        for code in range(1 << len(rules)):
            inside = [bool(code >> bit & 1) for bit in range(len(rules))]
            bits = iter(inside)
            dense = [next(bits) if isinstance(each, Lifted) else each for each in lifted]
            seams = _seams([panel.pattern for panel, is_dense in zip(panels, dense) if not is_dense])
            rows = RowSet(modality, seams, tuple(zip(rules, inside)))
            yield Group(number, rows, list(zip(panels, dense)))


def _seams(sparse: list[Pattern]) -> Seams:
    """Of the rows of a group, given its patterns that are not dense for it. Dense rows have no window to keep small."""
    if any(isinstance(pattern, VerticalSlash | Blocks) for pattern in sparse):
        return Seams.BLOCKS
    return Seams.JUMPS if sparse else Seams.NONE


def _assemble(
    selection: Selection,
    shard: Shard,
    tiles: Tiles,
    groups: Sequence[Group],
    tiles_of: Sequence[range],
    targets: Sequence[Target],
) -> Rows:
    """Number items and sources, and spell out what each item reaches. tiles_of: each group's."""
    device, prompt = shard.positions.device, len(shard.tokens)
    counts = [len(each) for each in tiles_of]
    first_item = starts_of(counts)
    sources, numbers = numbered([target.source for target in targets], shard.tokens)
    sizes = [0 if target.blocks is not None else counts[target.group] for target in targets]
    first_reach = starts_of(sizes)
    place, step = _places(targets, sizes, first_reach)
    group_unit, group_tile, group_count, bounds, beside, size, table = upload(
        device,
        [group.unit for group in groups],
        [each.start - start for each, start in zip(tiles_of, first_item)],
        counts,
        [limit for target in targets for limit in target.bounds],
        [target.beside for target in targets],
        sizes,
        [
            each
            for row in zip(
                numbers, (first_item[target.group] for target in targets), first_reach, place, step,
                *zip(*(target.bounds for target in targets)),
            )
            for each in row
        ],
    )  # fmt: skip
    items, reaches = first_item[-1], first_reach[-1]
    item_group = spread(torch.arange(len(groups), device=device), group_count, items)
    item_rows = group_tile.index_select(0, item_group) + torch.arange(items, device=device)

    number = spread(torch.arange(len(targets), device=device), size, reaches)
    source, item, reach, place, step, *limit = table.view(-1, 9).index_select(0, number).unbind(1)
    local = torch.arange(reaches, device=device) - reach
    item = item + local
    row_tile = item_rows.index_select(0, item)
    first, last = (each.index_select(0, row_tile) for each in (tiles.first, tiles.last))
    where = limits(source, len(sources), limit, first, last, prompt)
    return Rows(
        shard=shard,
        heads=tuple(unit.heads for unit in selection.units),
        group=selection.group,
        tiles=tiles,
        item_unit=group_unit.index_select(0, item_group).int(),
        item_rows=item_rows.int(),
        sources=sources,
        bounds=bounds.int().view(-1, 4),
        beside=beside.bool() if any(target.beside for target in targets) else None,
        reaches=Reaches(item=item.int(), bounds=number.int(), **where),
        place=place + local * step,
        visits=list_visits(_looks(targets, numbers, counts, first_item, first_reach), item_rows, tiles),
    )


def _places(targets: Sequence[Target], sizes: Sequence[int], first: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each target's first line, and from one to the next, when lines are in order of items: side by side for each
    tile of a group. sizes, first: lines of each target, and where they start in order of targets."""
    place, step = [0] * len(targets), [0] * len(targets)
    for _, members in groupby(range(len(targets)), key=lambda number: targets[number].group):
        with_lines = [number for number in members if sizes[number]]
        for nth_of_tile, number in enumerate(with_lines):
            place[number], step[number] = first[with_lines[0]] + nth_of_tile, len(with_lines)
    return place, step


def _looks(
    targets: Sequence[Target], numbers: Sequence[int], counts: Sequence[int], first_item: Sequence[int],
    first_reach: Sequence[int],
) -> list[Look]:  # fmt: skip
    """numbers: of sources. counts, first_item: of groups. first_reach: of targets."""
    sizes = [0 if target.blocks is None else counts[target.group] for target in targets]
    place, step = _places(targets, sizes, starts_of(sizes))
    return [
        Look(
            blocks=target.blocks,
            bounds=number,
            source=numbers[number],
            tiles=sizes[number],
            first_item=first_item[target.group],
            lines=first_reach[number - 1] if number and targets[number - 1].beside else -1,
            place=place[number],
            step=step[number],
        )
        for number, target in enumerate(targets)
        if target.blocks is not None
    ]
