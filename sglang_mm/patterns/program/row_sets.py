"""Which rows a pattern makes dense, and the tiles of those rows and of the others, for all units together.

S sets of rows, X slots of the shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Dense, Grid, TriShape
from sglang_mm.patterns.chosen import BLOCK, Marks, Panel
from sglang_mm.patterns.program.ragged import spread, starts_of, upload
from sglang_mm.patterns.program.shard import JUMP, Seams, Shard, Tiles, cut_lists, tiles_in
from sglang_mm.patterns.program.sources import concatenate
from sglang_mm.types import INF, Axis, Modality, TokenMap


@dataclass(frozen=True)
class Lifted:
    """Rows that see everything: those of the classes along `axis`, and all from position `start` on."""

    axis: Axis
    classes: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class RowSet:
    """Rows of one modality (None: all) that are, or are not, among each of some lifted ones; cut at seams."""

    modality: Modality | None
    seams: Seams
    rules: tuple[tuple[Lifted, bool], ...] = ()


def lifted_by(panel: Panel, marks: Marks, tokens: TokenMap, sparse_rows: bool) -> Lifted | bool:
    """Which rows the panel makes dense; or whether all are."""
    pattern = panel.pattern
    if isinstance(pattern, Dense):
        return True
    if isinstance(pattern, TriShape) and not sparse_rows:
        return Lifted(Axis.FRAME, (), len(tokens) - pattern.last)
    if isinstance(pattern, Grid) and not sparse_rows and (pattern.horizontal or pattern.tail):
        classes = marks.classes if pattern.horizontal else ()
        return Lifted(panel.chosen.axis, classes, tokens.tail if pattern.tail else len(tokens))
    return False


def cut_row_sets(shard: Shard, sets: Sequence[RowSet], tile: int) -> tuple[Tiles, dict[RowSet, range]]:
    """The tiles of all sets, side by side, and which are whose."""
    plain, ruled = [each for each in sets if not each.rules], [each for each in sets if each.rules]
    parts = [shard.of(each.modality, tile, each.seams) for each in plain]
    counts = list(map(len, parts))
    if ruled:
        made, more = _cut_ruled(shard, ruled, tile)
        parts, counts = [*parts, made], [*counts, *more]
    starts = starts_of(counts)
    ranges = {each: range(*around) for each, around in zip([*plain, *ruled], pairwise(starts))}
    return parts[0] if len(parts) == 1 else concatenate(parts, [None] * len(parts)), ranges


def _cut_ruled(shard: Shard, sets: Sequence[RowSet], tile: int) -> tuple[Tiles, list[int]]:
    """The tiles of sets with rules, and how many each has. Rows come in runs; only these are looked at one by one."""
    slots = shard.slots(tile)
    inside = _members(shard, sets, tile).flatten()
    change = (inside[1:] != inside[:-1]).nonzero().flatten() + 1  # a slot without a row is first and last in each set
    if not len(change):
        return shard.pick(shard.positions[:0], tile), [0] * len(sets)
    start, stop = change.view(-1, 2).unbind(1)
    number, size = start // len(slots), stop - start
    row = slots.index_select(0, start - number * len(slots))
    first, last = shard.positions.index_select(0, row), shard.positions.index_select(0, row + size - 1)
    (gap_S,) = upload(row.device, [JUMP * tile if each.seams == Seams.JUMPS else INF for each in sets])
    is_seam = (number[1:] != number[:-1]) | (first[1:] - last[:-1] > gap_S.index_select(0, number)[1:])
    if any(each.seams == Seams.BLOCKS for each in sets):
        (in_blocks_S,) = upload(row.device, [each.seams == Seams.BLOCKS for each in sets])
        is_seam |= (first[1:] // BLOCK != last[:-1] // BLOCK) & in_blocks_S.bool().index_select(0, number)[1:]

    ends = torch.cumsum(size, 0)
    of_lists = is_seam.nonzero().flatten()
    counts = torch.cat([ends.new_zeros(1), ends.index_select(0, of_lists), ends[-1:]]).diff()
    number = number.index_select(0, torch.cat([of_lists, of_lists.new_full((1,), len(number) - 1)]))
    tiles_S = torch.zeros_like(gap_S).index_add_(0, number, tiles_in(counts, tile))
    rows, *tiles = torch.cat([ends[-1:], tiles_S]).tolist()
    ptr = cut_lists(counts, tile, sum(tiles))
    index = spread((row - ends + size).int(), size, rows) + torch.arange(rows, dtype=torch.int32, device=row.device)
    return shard.tiles(index, ptr, torch.zeros_like(ptr[:-1])), tiles


def _members(shard: Shard, sets: Sequence[RowSet], tile: int) -> Tensor:
    """bool [S, X]: whether the row in each slot is of the set."""
    lifted = list(dict.fromkeys(each for row_set in sets for each, _ in row_set.rules))
    is_row = shard.slots(tile) >= 0
    is_lifted = _is_lifted(shard, lifted, tile)
    modalities = [each for each in Modality if any(row_set.modality == each for row_set in sets)]
    of_modality = [(shard.slot_modality(tile) == each)[None] for each in modalities]
    table = torch.cat([is_lifted, is_row > is_lifted, *of_modality, is_row[None]])
    everything = len(table) - 1
    rows = []
    for row_set in sets:
        rows.append([lifted.index(each) + (0 if inside else len(lifted)) for each, inside in row_set.rules])
        if row_set.modality is not None:
            rows[-1].append(2 * len(lifted) + modalities.index(row_set.modality))
    width = max(map(len, rows))
    columns = upload(table.device, *([row[i] if i < len(row) else everything for row in rows] for i in range(width)))
    here = table.index_select(0, columns[0])
    for column in columns[1:]:
        here &= table.index_select(0, column)
    return here


def _is_lifted(shard: Shard, lifted: Sequence[Lifted], tile: int) -> Tensor:
    """bool [lifted, X]: whether the row in each slot is."""
    sizes = {axis: len(shard.tokens.classes(axis)) + 1 for axis in Axis if any(each.axis == axis for each in lifted)}
    marked = [
        [i * size + name for i, each in enumerate(lifted) if each.axis == axis for name in each.classes]
        for axis, size in sizes.items()
    ]
    slots = shard.slots(tile)
    starts, *marked = upload(slots.device, [each.start for each in lifted], *marked)
    found = slots >= torch.searchsorted(shard.positions, starts.clamp(min=0))[:, None]
    for (axis, size), names in zip(sizes.items(), marked):
        if len(names):
            on_line = torch.zeros(len(lifted) * size, dtype=torch.bool, device=slots.device)
            on_line[names] = True
            found |= on_line.view(-1, size).index_select(1, shard.slot_classes(axis, tile))
    return found
