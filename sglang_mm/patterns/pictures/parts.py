"""To which part of its pattern each pair of a mask belongs: what pictures colour.

A pair that several parts show belongs to the one whose entry shows it in the tile program: dense rows before sink,
sink before window, window before everything else; columns inside blocks go to the blocks, places on vertical lines to
the lines. Memory is O(R * K) for R rows and K keys that are looked at; S tokens.
"""

from collections.abc import Iterator
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, Panel, Unit
from sglang_mm.types import Modality, TokenMap

NO_CLASS = -2
"""Of no token: tokens that are no place of a frame have class -1."""


class Part(IntEnum):
    """Thin parts have the larger numbers: where a picture shows several pairs as one pixel, the largest is seen."""

    UNSEEN = 0
    BLOCKS = 1
    WINDOW = 2
    SINK = 3
    DENSE_ROWS = 4
    SLASH = 5
    LINES = 6
    SEPARATORS = 7


def part_of_pairs(unit: Unit, tokens: TokenMap) -> Tensor:
    """uint8 [S, S] of Part: entry (i, j) is UNSEEN exactly where `unit_mask` is false."""
    everything = torch.arange(len(tokens), device=tokens.modality.device)
    return UnitParts(unit, tokens).of(everything, everything)


class UnitParts:
    """The same for some rows and keys of a long prompt."""

    def __init__(self, unit: Unit, tokens: TokenMap):
        self._panels = [_PanelParts(panel, tokens) for panel in unit.panels]

    def of(self, row_R: Tensor, key_K: Tensor) -> Tensor:
        """uint8 [R, K] of Part. row_R, key_K: positions, int64."""
        part_RK = torch.zeros(len(row_R), len(key_K), dtype=torch.uint8, device=row_R.device)
        row_R, key_K = row_R.int(), key_K.int()  # most of the time goes into reading them
        is_causal_RK = key_K <= row_R[:, None]
        for panel in self._panels:
            is_row_R, is_key_K = panel.is_row_S[row_R], panel.is_key_S[key_K]
            if not bool(is_row_R.any() & is_key_K.any()):
                continue
            open_RK = is_causal_RK & (is_row_R[:, None] & is_key_K)
            for part, shown_RK in panel.layers(row_R, key_K):
                part_RK.masked_fill_(open_RK & shown_RK, int(part))
                open_RK &= ~shown_RK
        return part_RK


class _PanelParts:
    """One panel, with what is known of each token looked up once."""

    def __init__(self, panel: Panel, tokens: TokenMap):
        self.pattern, self.chosen, self.tokens = panel.pattern, panel.chosen, tokens
        self.is_row_S, self.is_key_S = _of(panel.rows, tokens), _of(panel.keys, tokens)

    def layers(self, row_R: Tensor, key_K: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """(part, pairs it shows: bool that broadcasts to [R, K]), the part that has a pair first."""
        pattern, row_R1 = self.pattern, row_R[:, None]
        yield Part.DENSE_ROWS, self._is_dense_S[row_R1]
        if isinstance(pattern, AShape | TriShape | VerticalSlash | Grid):
            yield Part.SINK, key_K < pattern.sink
            yield Part.WINDOW, key_K > row_R1 - pattern.window
        match pattern:
            case VerticalSlash():
                yield Part.SLASH, self._on_diagonals(row_R, key_K)
                yield Part.LINES, self._is_line_S[key_K]
            case Grid():
                yield Part.SEPARATORS, self.tokens.separators[key_K]
                yield Part.LINES, self._is_line_S[key_K] & pattern.vertical
                if pattern.slash:
                    yield Part.SLASH, self._at_shifts(row_R, key_K)
            case Blocks():
                yield Part.BLOCKS, self._listed(row_R, key_K)

    @cached_property
    def _is_dense_S(self) -> Tensor:
        """Rows to which the pattern shows everything."""
        i = torch.arange(len(self.tokens), device=self.tokens.modality.device)
        match self.pattern:
            case Dense():
                return i >= 0
            case TriShape():
                return i >= len(self.tokens) - self.pattern.last
            case Grid():
                in_tail_S = (i >= self.tokens.tail) & self.pattern.tail
                return self._is_line_S & self.pattern.horizontal | in_tail_S
            case _:
                return i < 0

    @cached_property
    def _is_line_S(self) -> Tensor:
        """Chosen columns; tokens of a chosen class."""
        if isinstance(self.pattern, Grid):
            return torch.isin(self._class_S, self.chosen.classes.to(self._class_S.device))
        is_column_S = torch.zeros_like(self.is_key_S)
        is_column_S[self.chosen.columns.to(is_column_S.device)] = True
        return is_column_S

    @property
    def _class_S(self) -> Tensor:
        return self.tokens.classes(self.chosen.axis).of_token

    def _on_diagonals(self, row_R: Tensor, key_K: Tensor) -> Tensor:
        row_block_N, row_R = (row_R // BLOCK).unique(return_inverse=True)
        distance_NM = row_block_N[:, None] - torch.arange(self._blocks, device=row_R.device)
        is_chosen_NM = torch.isin(distance_NM, self.chosen.diagonals.to(row_R.device))
        return is_chosen_NM[row_R].index_select(1, key_K // BLOCK)

    def _at_shifts(self, row_R: Tensor, key_K: Tensor) -> Tensor:
        """Both tokens are places of one item, and their classes differ by a chosen shift."""
        starts = self.tokens.classes(self.chosen.axis).starts
        class_R, class_K = self._class_S[row_R], self._class_S[key_K]
        at_shift_RK = torch.zeros(len(row_R), len(key_K), dtype=torch.bool, device=row_R.device)
        for space, shift in self.chosen.shifts.tolist():
            start, stop = starts[space], starts[space + 1]
            wanted_R = (class_R - start - shift) % (stop - start) + start
            wanted_R = wanted_R.where((class_R >= start) & (class_R < stop), NO_CLASS)
            at_shift_RK |= class_K == wanted_R[:, None]
        return at_shift_RK & (self.tokens.item[row_R][:, None] == self.tokens.item[key_K])

    def _listed(self, row_R: Tensor, key_K: Tensor) -> Tensor:
        """Rows of a block without a list see nothing."""
        chosen = self.chosen
        row_block_N, row_R = (row_R // BLOCK).unique(return_inverse=True)
        is_listed_NB = torch.zeros(len(row_block_N), self._blocks, dtype=torch.bool, device=row_R.device)
        has_list_N = torch.isin(row_block_N, chosen.row_blocks.to(row_R.device)).nonzero().flatten()
        places = torch.searchsorted(chosen.row_blocks, row_block_N[has_list_N].to(chosen.row_blocks))
        for n, place in zip(has_list_N.tolist(), places.tolist()):
            is_listed_NB[n, chosen.key_blocks[chosen.ptr[place] : chosen.ptr[place + 1]].to(row_R.device)] = True
        return is_listed_NB[row_R].index_select(1, key_K // BLOCK)

    @property
    def _blocks(self) -> int:
        return -(-len(self.tokens) // BLOCK)


def _of(modality: Modality | None, tokens: TokenMap) -> Tensor:
    """bool [S]: tokens of the modality; all for None."""
    return torch.ones_like(tokens.modality, dtype=torch.bool) if modality is None else tokens.modality == modality
