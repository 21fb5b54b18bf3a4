"""Lists of keys that entries look into, and their tables for one piece. Lines are compact: that is the permutation.

At 64K tokens, one class of 257 touches half of all 128 x 128 tiles where it lies, and 0.6% of them as a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_mm.patterns.program.ragged import borders, spread, starts_of, upload
from sglang_mm.patterns.program.shard import Seams, Shard, Tiles
from sglang_mm.types import Axis, Modality, TokenMap

ANY = -1
"""Instead of a modality, in tables."""


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
KINDS = Raw, ColumnLines, ClassLines, ByClass
"""In the order of their tiles."""


class Columns(NamedTuple):
    """Of every column of every source, int64: number of the source, position; the prompt's length for none."""

    number: Tensor
    position: Tensor


class ClassLists(NamedTuple):
    """Of every list of tokens in every source, int64: the source's number, list as in `Shard.lists`, sink, modality."""

    number: Tensor
    list: Tensor
    sink: Tensor
    modality: Tensor


class Sources(Sequence):
    """The distinct sources of one layer, raw ones first; or one that is ByClass."""

    def __init__(self, sources: Sequence[Source], tokens: TokenMap):
        self._sources, self._tokens = tuple(sources), tokens
        self.raw = tuple(each for each in sources if isinstance(each, Raw))

    def __getitem__(self, number):
        return self._sources[number]

    def __len__(self) -> int:
        return len(self._sources)

    @cached_property
    def columns(self) -> Columns | None:
        """None without such sources."""
        lines = [(number, each) for number, each in enumerate(self) if isinstance(each, ColumnLines)]
        if not lines:
            return None
        counts = [len(each.columns) for _, each in lines]
        modalities = [_code(each.modality) for _, each in lines]
        device = self._tokens.modality.device
        table = upload(device, counts, [n for n, _ in lines], [each.sink for _, each in lines], modalities)
        line = spread(torch.arange(len(lines), device=device), table[0], sum(counts))
        number, sink, modality = (each.index_select(0, line) for each in table[1:])
        position = torch.cat([each.columns.to(device) for _, each in lines])
        seen = position >= sink
        if any(each != ANY for each in modalities):
            seen &= (modality == ANY) | (modality == self._tokens.modality.index_select(0, position))
        return Columns(number, torch.where(seen, position, len(self._tokens)))

    @cached_property
    def class_lists(self) -> ClassLists | None:
        """None without such sources."""
        first = dict(zip(Axis, starts_of([1, *(len(self._tokens.classes(axis)) for axis in Axis)])[1:]))
        rows = [
            (number, at, each.sink, _code(each.modality))
            for number, each in enumerate(self)
            if isinstance(each, ClassLines)
            for at in (0, *(first[each.axis] + name for name in each.classes))
        ]
        return ClassLists(*upload(self._tokens.modality.device, *zip(*rows))) if rows else None

    @cached_property
    def of_one_modality(self) -> bool:
        """Whether lines of classes are, in any source."""
        return any(isinstance(each, ClassLines) and each.modality is not None for each in self)


def numbered(wanted: Sequence[Source], tokens: TokenMap) -> tuple[Sources, list[int]]:
    """The distinct sources, and the number of each wanted one."""
    distinct: dict = {}
    keys = [_key(source) for source in wanted]
    for key, source in zip(keys, wanted):
        distinct.setdefault(key, source)
    ordered = sorted(distinct.items(), key=lambda each: KINDS.index(type(each[1])))
    numbers = {key: number for number, (key, _) in enumerate(ordered)}
    return Sources([source for _, source in ordered], tokens), [numbers[key] for key in keys]


def key_tiles(sources: Sources, keys: Shard, tile: int) -> Tiles:
    """Every source's keys of this piece, cut into tiles of at most `tile`."""
    if len(sources) == 1 and isinstance(sources[0], ByClass):
        return keys.by_class(sources[0].axis, tile)
    raw = raw_tiles(sources, keys, tile)
    found = [lines for lines in (_columns(sources, keys), _classes(sources, keys)) if lines is not None]
    if not found:
        return raw
    number, index = (torch.cat(part) if len(found) > 1 else part[0] for part in zip(*found))
    return concatenate([raw, keys.pick_counted(index, tile, borders(number, len(sources)).diff())], [None, None])


def raw_tiles(sources: Sources, keys: Shard, tile: int) -> Tiles:
    """Those of the raw sources. Made once per request: layers differ little in these."""

    def make() -> Tiles:
        parts = [keys.of(each.modality, tile, each.seams) for each in sources.raw]
        return concatenate([keys.pick(keys.positions[:0], tile), *parts], range(-1, len(parts)))

    return keys.once(("raw", sources.raw, tile), make)


def concatenate(parts: Sequence[Tiles], sources: Sequence[int | None]) -> Tiles:
    """One table of several. sources: the number that all tiles of a part get; None: keep theirs."""
    starts = starts_of(len(part.index) for part in parts)
    ptr = torch.cat([part.ptr[:-1] + start for part, start in zip(parts, starts)] + [parts[-1].ptr[-1:] + starts[-2]])
    index, first, last = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "first", "last"))
    own = [part.source if n is None else torch.full_like(part.source, n) for part, n in zip(parts, sources)]
    return Tiles(index, ptr, first, last, torch.cat(own))


def _code(modality: Modality | None) -> int:
    return ANY if modality is None else int(modality)


def _key(source: Source):
    if isinstance(source, ColumnLines):
        at = source.columns  # by address: comparing contents would wait for the device
        return source.modality, source.sink, at.data_ptr(), at.stride(), len(at)
    return source


def _columns(sources: Sources, keys: Shard) -> tuple[Tensor, Tensor] | None:
    """(number of the source, key of the piece), int64 each, in order of both."""
    if sources.columns is None:
        return None
    index = keys.index_of().index_select(0, sources.columns.position)
    here = (index >= 0).nonzero().flatten()
    return sources.columns.number.index_select(0, here), index.index_select(0, here).long()


def _classes(sources: Sources, keys: Shard) -> tuple[Tensor, Tensor] | None:
    """The same."""
    if sources.class_lists is None:
        return None
    number, at, sink, modality = sources.class_lists
    start = keys.lists().start.index_select(0, at)
    count = keys.lists().stop.index_select(0, at) - start
    before = torch.cumsum(count, 0) - count
    total = int(count.sum())
    line = spread(torch.arange(len(count), device=count.device), count, total)
    place = (start - before).index_select(0, line) + torch.arange(total, device=count.device)
    index = keys.lists().index.index_select(0, place)
    seen = keys.positions.index_select(0, index) >= sink.index_select(0, line)
    if sources.of_one_modality:
        wanted = modality.index_select(0, line)
        seen &= (wanted == ANY) | (wanted == keys.modality().index_select(0, index))
    here = seen.nonzero().flatten()
    number, index = number.index_select(0, line.index_select(0, here)), index.index_select(0, here)
    first = number * len(keys)
    return number, torch.sort(first + index).values - first
