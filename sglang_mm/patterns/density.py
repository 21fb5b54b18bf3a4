"""How much of causal attention a selection computes: exact counts of (query, key) pairs, without any S x S table.

Each sparse row i has three ranges of keys. The outer two it sees; of the middle one it sees columns (separators,
lines), whole blocks of 128, and keys at chosen class differences:

    0 ........ lo .......................... hi ........ i
    |  sink    |  middle: columns | blocks   |  window   |         lo = min(sink, i + 1), hi = max(lo, i + 1 - window)

What depends on the prompt alone is counted once per prompt and kept as long as its token map: prefix sums over keys,
causal pairs, pairs in sink and window, tokens by class. Each selection then adds its own: a column is seen by all rows
a window or more after it, a block that lies in the middle of every row of a row block counts as a product, and the few
that are cut by lo or hi are counted row by row. Work is O(columns) plus the listed pairs of blocks, plus O(S) for
class differences or rows that a class makes dense.
Suffixes: S tokens, Z = S + 1 prefix sums, R rows, C columns, E pairs of blocks, B = 128.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Phases, Unit
from sglang_mm.types import Axis, Modality, TokenMap

Value = TypeVar("Value")
CountBefore = Callable[[Tensor], Tensor]
"""Positions, to how many of some keys come before each."""


def density(unit: Unit, tokens: TokenMap) -> float:
    """Pairs that one head of the unit sees, over the S * (S + 1) / 2 causal ones; 0 < density <= 1."""
    seen = sum(pairs(panel.pattern, tokens, panel.chosen, panel.rows, panel.keys) for panel in unit.panels)
    return seen / causal_pairs(tokens)


def causal_pairs(
    tokens: TokenMap, rows: Modality | None = None, keys: Modality | None = None, within: range | None = None
) -> int:
    """What dense attention computes; arguments as of `pairs`."""
    counted = _Counted(tokens, rows, keys, range(len(tokens)) if within is None else within)
    return counted.causal()


def pairs(
    pattern: Pattern,
    tokens: TokenMap,
    chosen: Chosen,
    rows: Modality | None = None,
    keys: Modality | None = None,
    within: range | None = None,
) -> int:
    """How many entries of the pattern's mask are true, among rows and keys of the modalities (None: all).

    within: of these rows of the prompt alone (None: all). chosen: shifts are below the size of their name space and,
    like columns, diagonals and blocks, named once.
    """
    counted = _Counted(tokens, rows, keys, range(len(tokens)) if within is None else within)
    match pattern:
        case Dense():
            return counted.causal()
        case Blocks():
            everything = _Ranges(sink=0, window=0)
            return _in_blocks(*_listed(chosen), everything, counted.rows, len(tokens), counted.keys_before)
    ranges = _Ranges(pattern.sink, pattern.window)
    dense_R, sparse_R = _split(pattern, chosen, counted)
    seen = counted.near(ranges)
    if len(dense_R):
        seen += int((counted.keys_before(dense_R + 1) - _near(ranges, dense_R, counted.keys_before)).sum())
    match pattern:
        case VerticalSlash():
            column_C = counted.of_keys(chosen.columns)
            others_before = _without(column_C, counted.keys_before)
            blocks = _on_diagonals(chosen, len(tokens), counted.within)
            seen += _in_columns(column_C, ranges, sparse_R)
            seen += _in_blocks(*blocks, ranges, sparse_R, len(tokens), others_before)
        case Grid():
            column_C = counted.separators()
            if pattern.vertical:
                column_C = torch.cat([column_C, counted.of_keys(_of_classes(tokens, chosen))])
            seen += _in_columns(column_C, ranges, sparse_R)
            if pattern.slash and len(chosen.shifts):
                seen += _at_shifts(chosen, tokens, ranges, sparse_R, counted.others(column_C))
    return seen


@dataclass(frozen=True)
class _Ranges:
    sink: int
    window: int

    def middle(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """lo, hi of each row."""
        lo = (row + 1).clamp(max=self.sink)
        return lo, torch.maximum(lo, row + 1 - self.window)


_KEPT: WeakKeyDictionary[TokenMap, dict] = WeakKeyDictionary()
"""By token map what was counted; the counts hold no map, so they go with it."""


def _once(tokens: TokenMap, key: tuple, make: Callable[[], Value]) -> Value:
    kept = _KEPT.setdefault(tokens, {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


@dataclass(frozen=True, eq=False)
class _Counted:
    """Rows of one modality within a range against keys of one modality, and what is known of them."""

    tokens: TokenMap
    of_rows: Modality | None
    of_key: Modality | None
    within: range

    @property
    def rows(self) -> Tensor:
        """int64 [R], ascending."""

        def make() -> Tensor:
            modality = self.tokens.modality[self.within.start : self.within.stop]
            is_row = torch.ones_like(modality, dtype=torch.bool) if self.of_rows is None else modality == self.of_rows
            return is_row.nonzero().flatten() + self.within.start

        return _once(self.tokens, ("rows", self.of_rows, self.within), make)

    @property
    def _keys_Z(self) -> Tensor:
        return _once(self.tokens, ("keys", self.of_key), lambda: _before(_of(self.of_key, self.tokens)))

    def keys_before(self, position: Tensor) -> Tensor:
        return self._keys_Z[position]

    def of_keys(self, position_C: Tensor) -> Tensor:
        """Those of the keys' modality."""
        position_C = position_C.to(self.tokens.modality.device)
        return position_C if self.of_key is None else position_C[self.tokens.modality[position_C] == self.of_key]

    def separators(self) -> Tensor:
        """int64 [C]: of the keys' modality."""
        return _once(
            self.tokens,
            ("separators", self.of_key),
            lambda: self.of_keys(self.tokens.separators.nonzero().flatten()),
        )

    def others(self, column_C: Tensor) -> Tensor:
        """bool [S]: keys that are no columns."""
        key_S = _of(self.of_key, self.tokens)
        key_S[column_C] = False
        return key_S

    def causal(self) -> int:
        return _once(
            self.tokens,
            ("causal", self.of_rows, self.of_key, self.within),
            lambda: int(self.keys_before(self.rows + 1).sum()),
        )

    def near(self, ranges: _Ranges) -> int:
        """Pairs in sink and window."""
        return _once(
            self.tokens,
            ("near", self.of_rows, self.of_key, self.within, ranges),
            lambda: int(_near(ranges, self.rows, self.keys_before).sum()),
        )


def _of(modality: Modality | None, tokens: TokenMap) -> Tensor:
    return torch.ones_like(tokens.modality, dtype=torch.bool) if modality is None else tokens.modality == modality


def _before(chosen_S: Tensor) -> Tensor:
    """int64 [Z]: how many are chosen before each token."""
    return torch.nn.functional.pad(chosen_S.cumsum(0), (1, 0))


def _of_classes(tokens: TokenMap, chosen: Phases) -> Tensor:
    """int64 [C]: tokens of a chosen class."""
    classes = tokens.classes(chosen.axis)
    order_S = _once(tokens, ("by class", chosen.axis), lambda: classes.of_token.argsort())
    starts = _once(tokens, ("class starts", chosen.axis), lambda: _starts(classes.counts, len(tokens)))
    found = [order_S[starts[each] : starts[each + 1]] for each in chosen.classes.tolist()]
    return torch.cat([order_S[:0], *found])


def _starts(counts: Tensor, tokens: int) -> list[int]:
    """Where each class starts behind the tokens without one."""
    return (_before(counts) + tokens - counts.sum()).tolist()


def _split(pattern: Pattern, chosen: Chosen, counted: _Counted) -> tuple[Tensor, Tensor]:
    """int64: rows that the pattern makes dense, in any order, and the others, ascending."""
    rows, size = counted.rows, len(counted.tokens)
    match pattern:
        case TriShape():
            first = max(0, size - pattern.last)
        case Grid(tail=True):
            first = counted.tokens.tail
        case _:
            first = size
    place = int(torch.searchsorted(rows, first))
    dense, sparse = rows[place:], rows[:place]
    if isinstance(pattern, Grid) and pattern.horizontal:
        is_dense = torch.zeros(size, dtype=torch.bool, device=rows.device)
        is_dense[_of_classes(counted.tokens, chosen)] = True
        dense, sparse = torch.cat([dense, sparse[is_dense[sparse]]]), sparse[~is_dense[sparse]]
    return dense, sparse


def _near(ranges: _Ranges, row_R: Tensor, keys_before: CountBefore) -> Tensor:
    """int64 [R]: keys in sink and window."""
    lo_R, hi_R = ranges.middle(row_R)
    return keys_before(lo_R) + keys_before(row_R + 1) - keys_before(hi_R)


def _in_columns(column_C: Tensor, ranges: _Ranges, row_R: Tensor) -> int:
    """Pairs with these keys in the middle: those after the sink, for rows a window or more later."""
    column_C = column_C[column_C >= ranges.sink]
    return len(column_C) * len(row_R) - int(torch.searchsorted(row_R, column_C + ranges.window).sum())


def _without(column_C: Tensor, keys_before: CountBefore) -> CountBefore:
    """Of the keys but the columns, which are ascending."""
    return lambda position: keys_before(position) - torch.searchsorted(column_C, position.contiguous())


def _listed(chosen: BlockSet) -> tuple[Tensor, Tensor]:
    """Row block and key block of each listed pair of blocks, int64 [E]."""
    return chosen.row_blocks.repeat_interleave(chosen.ptr.diff()), chosen.key_blocks


def _on_diagonals(chosen: Lines, tokens: int, within: range) -> tuple[Tensor, Tensor]:
    """Row block and key block of each pair of blocks on a chosen diagonal, int64 [E]."""
    rows = torch.arange(within.start // BLOCK, -(-within.stop // BLOCK), device=chosen.diagonals.device)
    row_block = rows[:, None].expand(-1, len(chosen.diagonals))
    key_block = row_block - chosen.diagonals
    return row_block[key_block >= 0], key_block[key_block >= 0]


def _in_blocks(
    row_block_E: Tensor, key_block_E: Tensor, ranges: _Ranges, row_R: Tensor, size: int, keys_before: CountBefore
) -> int:
    """Pairs in the middle whose blocks are listed."""
    if not len(row_block_E):
        return 0
    device = row_R.device
    row_block_E, key_block_E = row_block_E.to(device), key_block_E.to(device)
    row_NB = torch.zeros(-(-size // BLOCK) * BLOCK, dtype=torch.bool, device=device)
    row_NB[row_R] = True
    row_NB = row_NB.view(-1, BLOCK)
    first, stop = key_block_E * BLOCK, (key_block_E * BLOCK + BLOCK).clamp(max=size)
    hi_of_first = row_block_E * BLOCK + 1 - ranges.window
    is_whole = (ranges.sink <= first) & (stop <= hi_of_first)
    whole_E = row_NB.sum(1)[row_block_E] * (keys_before(stop) - keys_before(first))

    cut = (~is_whole & (stop > ranges.sink) & (first < hi_of_first + BLOCK - 1)).nonzero()
    row_EB = row_block_E[cut] * BLOCK + torch.arange(BLOCK, device=device)
    lo_EB, hi_EB = ranges.middle(row_EB)
    lo_EB = torch.maximum(lo_EB, first[cut])
    hi_EB = torch.maximum(lo_EB, torch.minimum(hi_EB, stop[cut]))
    cut_EB = row_NB[row_block_E[cut].flatten()] * (keys_before(hi_EB) - keys_before(lo_EB))
    return int(whole_E[is_whole].sum() + cut_EB.sum())


def _line_places(tokens: TokenMap, axis: Axis) -> Tensor:
    """int64, ascending: ((item, class), position) of each place of a frame, in one number."""
    classes = tokens.classes(axis)
    class_S = classes.of_token.long()
    line_S = tokens.item.long() * len(classes) + class_S
    return (line_S * len(tokens) + torch.arange(len(tokens), device=line_S.device))[class_S >= 0].sort().values


def _at_shifts(chosen: Phases, tokens: TokenMap, ranges: _Ranges, sparse_R: Tensor, key_S: Tensor) -> int:
    """Pairs in the middle at a chosen difference of classes: for each row, keys of one class of its item are counted.

    Sorted by (item, class, position), the keys of a class of an item are one stretch, and its part between lo and hi
    another. Rows are taken in the same order, so that searches that follow each other read the same memory.
    """
    classes = tokens.classes(chosen.axis)
    class_S = classes.of_token
    order_S = _once(tokens, ("lines", chosen.axis), lambda: _line_places(tokens, chosen.axis))
    position_S = order_S % len(tokens)
    is_row_S = torch.zeros_like(key_S)
    is_row_S[sparse_R] = True
    key_place = order_S[key_S[position_S]]
    row_R = position_S[is_row_S[position_S]]
    spaces_R = classes.spaces.to(row_R.device)[class_S[row_R].long()]
    seen = 0
    for space, shift in chosen.shifts.tolist():
        row = row_R[spaces_R == space]
        start, stop = classes.starts[space], classes.starts[space + 1]
        key_class = (class_S[row].long() - start - shift) % (stop - start) + start
        stretch = (tokens.item[row].long() * len(classes) + key_class) * len(tokens)
        lo, hi = ranges.middle(row)
        seen += int((torch.searchsorted(key_place, stretch + hi) - torch.searchsorted(key_place, stretch + lo)).sum())
    return seen
