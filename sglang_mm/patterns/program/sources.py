"""Lists of keys that entries look into, and their tables for one piece. Lines are compact: that is the permutation.

At 64K tokens, one class of 257 touches half of all 128 x 128 tiles where it lies, and 0.6% of them as a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.shard import Seams, Shard, Tiles, spread
from sglang_mm.types import Axis, Modality


@dataclass(frozen=True)
class Raw:
    """All keys of a modality (None: of the piece), cut at seams."""

    modality: Modality | None
    seams: Seams


@dataclass(frozen=True, eq=False)
class ColumnLines:
    """Chosen key positions, int64, ascending, from `sink` on."""

    modality: Modality | None
    sink: int
    columns: Tensor


@dataclass(frozen=True)
class ClassLines:
    """Separators, and keys of the classes along the axis, from `sink` on."""

    modality: Modality | None
    sink: int
    axis: Axis
    classes: tuple[int, ...]


@dataclass(frozen=True)
class ByClass:
    """Places of frames, a source per (item, class): the one source of programs for class differences."""

    axis: Axis


Source = Raw | ColumnLines | ClassLines | ByClass


def numbered(wanted: Sequence[Source]) -> tuple[list[Source], list[int]]:
    """The distinct sources in the order of their tiles, and the number of each wanted one."""
    distinct: dict = {}
    for source in wanted:
        distinct.setdefault(_key(source), source)
    ordered = sorted(distinct.items(), key=lambda each: _rank(each[1]))
    numbers = {key: number for number, (key, _) in enumerate(ordered)}
    return [source for _, source in ordered], [numbers[_key(source)] for source in wanted]


def key_tiles(sources: Sequence[Source], keys: Shard, tile: int) -> Tiles:
    """Every source's keys of this piece, cut into tiles of at most `tile`. sources: as `numbered` orders them."""
    if len(sources) == 1 and isinstance(sources[0], ByClass):
        return keys.by_class(sources[0].axis, tile)
    raw = [keys.of(source.modality, tile, source.seams) for source in sources if isinstance(source, Raw)]
    number, index = _lines(sources, keys)
    lines = keys.pick_lists(index, tile, number)
    return concatenate([*raw, lines], [*range(len(raw)), None])


def concatenate(parts: Sequence[Tiles], sources: Sequence[int | None]) -> Tiles:
    """One table of several. sources: the number that all tiles of a part get; None: keep theirs."""
    ends = torch.tensor([0, *(len(part.index) for part in parts)]).cumsum(0).tolist()
    ptr = torch.cat([part.ptr[:-1] + start for part, start in zip(parts, ends)] + [parts[0].ptr.new_tensor(ends[-1:])])
    index, first, last = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "first", "last"))
    own = [part.source if n is None else torch.full_like(part.source, n) for part, n in zip(parts, sources)]
    return Tiles(index, ptr, first, last, torch.cat(own))


def _rank(source: Source) -> int:
    if isinstance(source, ClassLines):
        return 2 + list(Axis).index(source.axis)
    return isinstance(source, ColumnLines)


def _key(source: Source):
    if isinstance(source, ColumnLines):
        at = source.columns  # by address: comparing contents would wait for the device
        return source.modality, source.sink, at.data_ptr(), at.stride(), len(at)
    return source


def _lines(sources: Sequence[Source], keys: Shard) -> tuple[Tensor, Tensor]:
    """(number of the source, key of the piece), int64 each, of all lines, in order of both."""
    numbers = {kind: [i for i, each in enumerate(sources) if _rank(each) == kind] for kind in (1, 2, 3)}
    found = [_columns([(i, sources[i]) for i in numbers[1]], keys)]
    for kind in (2, 3):
        if numbers[kind]:
            found.append(_classes([(i, sources[i]) for i in numbers[kind]], keys))
    return tuple(torch.cat(part) for part in zip(*found))


def _columns(lines: Sequence[tuple[int, ColumnLines]], keys: Shard) -> tuple[Tensor, Tensor]:
    device = keys.positions.device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    wanted = torch.cat([none, *(source.columns.to(device) for _, source in lines)])
    counts = torch.tensor([len(source.columns) for _, source in lines], dtype=torch.int64, device=device)
    table = torch.tensor([[i, source.sink, -1 if source.modality is None else source.modality] for i, source in lines])
    number, sink, modality = table.view(-1, 3).to(none).repeat_interleave(counts, 0).unbind(1)
    near = keys.holds_block().index_select(0, wanted // BLOCK) & (wanted >= sink)
    number, wanted, modality = (each[near] for each in (number, wanted, modality))
    index = torch.searchsorted(keys.positions, wanted)  # of a key, or of the first one behind the column
    here = keys.positions.index_select(0, index.clamp(max=len(keys) - 1)) == wanted if len(keys) else index < 0
    number, index, modality = number[here], index[here], modality[here]
    allowed = (modality < 0) | (keys.modality()[index] == modality)
    return number[allowed], index[allowed]


def _classes(lines: Sequence[tuple[int, ClassLines]], keys: Shard) -> tuple[Tensor, Tensor]:
    """All lines of one axis."""
    device = keys.positions.device
    axis = lines[0][1].axis
    rows = []
    for _, source in lines:
        lists = [keys.separator_members(), *keys.class_members(axis, source.classes)]
        index = torch.cat(lists)
        if sum(len(each) > 0 for each in lists) > 1:
            index = torch.sort(index).values
        index = index[keys.positions[index] >= source.sink]
        if source.modality is not None:
            index = index[keys.modality()[index] == source.modality]
        rows.append(index)
    counts = torch.tensor([len(index) for index in rows], device=device)
    return spread(torch.tensor([i for i, _ in lines], device=device), counts), torch.cat(rows)
