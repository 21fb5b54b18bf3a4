"""Blocks of 128 positions that items look into: at chosen diagonals, or from lists; for all units together.

P pairs of a tile of rows and a target into blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Lines
from sglang_mm.patterns.program.ragged import position_of, spread, starts_of, upload
from sglang_mm.patterns.program.reaches import Visits
from sglang_mm.patterns.program.shard import Tiles

FAR = 1 << 32
"""Between sets in one table: above any block."""


@dataclass(frozen=True, eq=False)
class Look:
    """All rows of a group into blocks of a source. bounds: row of the table of bounds.

    tiles: of the group; first_item: the item of the first one. lines: its reach into the lines beside the blocks, -1
    for none. place, step: where its first tile's visits come among those of all, in order of items, and how far apart
    those of its tiles are.
    """

    blocks: Lines | BlockSet
    bounds: int
    source: int
    tiles: int
    first_item: int
    lines: int
    place: int
    step: int


def no_visits(device: torch.device) -> Visits:
    return Visits(*[torch.zeros(0, dtype=torch.int32, device=device)] * 7)


def list_visits(looks: Sequence[Look], item_rows: Tensor, tiles: Tiles) -> Visits:
    """item_rows: int64 [items], tiles: of rows. Raises ConfigError for rows without chosen blocks."""
    device = item_rows.device
    looks = sorted(looks, key=lambda look: isinstance(look.blocks, BlockSet))
    starts = starts_of(look.tiles for look in looks)
    pairs = starts[-1]
    if not pairs:
        return no_visits(device)
    sets, set_of = _distinct([look.blocks for look in looks])
    names = "first_item", "source", "bounds", "lines", "place", "step"
    columns = [
        [getattr(look, name) for name in names] + [start, number] for look, start, number in zip(looks, starts, set_of)
    ]
    size, table = upload(device, [look.tiles for look in looks], [each for row in columns for each in row])
    look_P = spread(torch.arange(len(looks), device=device), size, pairs)
    table = table.view(len(looks), -1).index_select(0, look_P)
    first_P, source_P, bounds_P, lines_P, place_P, step_P, start_P, set_P = table.unbind(1)
    local_P = torch.arange(pairs, device=device) - start_P
    item_P = first_P + local_P
    row_P = item_rows.index_select(0, item_P)
    block_P = tiles.first.index_select(0, row_P) // BLOCK
    in_order = position_of(place_P + local_P * step_P)

    split = starts[sum(isinstance(look.blocks, Lines) for look in looks)]
    values, from_P, count_P, total = _find(sets, set_P, block_P, split)
    count = count_P.index_select(0, in_order)
    pair = spread(in_order, count, total)
    offset = from_P.index_select(0, in_order) - (torch.cumsum(count, 0) - count)
    block = values.index_select(0, spread(offset, count, total) + torch.arange(total, device=device))
    if split:
        block = torch.where(pair < split, block_P.index_select(0, pair) - block, block)
    of_pair = (item_P, source_P, bounds_P, tiles.first.index_select(0, row_P), tiles.last.index_select(0, row_P))
    lines_P = torch.where(lines_P < 0, lines_P, lines_P + local_P)
    item, source, bounds, first, last, lines = (each.int().index_select(0, pair) for each in (*of_pair, lines_P))
    return Visits(item, source, block.int(), bounds, first, last, lines)


def _distinct(sets: Sequence[Lines | BlockSet]) -> tuple[list[Lines | BlockSet], list[int]]:
    """Each set once, and the number of each given one."""
    numbers: dict = {}
    found = [numbers.setdefault(id(each), len(numbers)) for each in sets]
    return [next(each for each in sets if id(each) == key) for key in numbers], found


def _find(
    sets: Sequence[Lines | BlockSet], set_P: Tensor, block_P: Tensor, split: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(values, where those of each pair start, how many it has, how many in all).

    Values are diagonals for pairs before `split`, blocks for the others.
    """
    device = set_P.device
    lines = [each for each in sets if isinstance(each, Lines)]
    listed = sets[len(lines) :]
    tables = [each.diagonals.to(device) for each in lines] + [each.key_blocks.to(device) for each in listed]
    (starts,) = upload(device, starts_of(map(len, tables)))
    start_P = starts.index_select(0, set_P)
    key_P = set_P * FAR + block_P
    values = torch.cat(tables)
    found, missing = [], torch.zeros((), dtype=torch.int64, device=device)
    if split:  # diagonals ascend: those up to the row's block
        sizes = starts.diff()[: len(lines)]
        number = spread(torch.arange(len(lines), device=device), sizes, sum(map(len, tables[: len(lines)])))
        keys = values[: len(number)] + number * FAR
        end = torch.searchsorted(keys, key_P[:split], right=True)
        found.append((start_P[:split], end - start_P[:split]))
    if listed:
        from_P, count_P, is_missing = _listed(listed, set_P[split:] - len(lines), block_P[split:])
        missing = is_missing.sum()
        found.append((start_P[split:] + from_P, count_P))
    from_P, count_P = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*found))
    total, wrong = torch.stack([count_P.sum(), missing]).tolist()
    if wrong:
        _refuse(listed, set_P[split:] - len(lines), block_P[split:], is_missing)
    return values, from_P, count_P, total


def _listed(sets: Sequence[BlockSet], set_P: Tensor, block_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(place in the set's key blocks, how many, whether the row block is missing) of each pair."""
    device = set_P.device
    sizes = [len(each.row_blocks) for each in sets]
    (size,) = upload(device, sizes)
    number = spread(torch.arange(len(sets), device=device), size, sum(sizes))
    keys = torch.cat([*(each.row_blocks.to(device) for each in sets), set_P.new_zeros(1)])  # so that there is one
    keys[: len(number)] += number * FAR
    wanted = set_P * FAR + block_P
    at = torch.searchsorted(keys[:-1], wanted)
    missing = (keys.index_select(0, at) != wanted) | (at == len(number))
    ptr = torch.cat([each.ptr.to(device) for each in sets] + [set_P.new_zeros(2)])
    at = at + set_P  # a set has a pointer more than row blocks
    first = ptr.index_select(0, at)
    return first, (ptr.index_select(0, at + 1) - first).clamp(min=0), missing


def _refuse(sets: Sequence[BlockSet], set_P: Tensor, block_P: Tensor, missing_P: Tensor) -> None:
    number = int(set_P[missing_P][0])
    wanted = block_P[set_P == number].unique().tolist()
    given = f"blocks for row blocks {sets[number].row_blocks.tolist()[:8]}.."
    raise ConfigError(given, f"row blocks {wanted[:8]}..", "select with the rows of this rank")
