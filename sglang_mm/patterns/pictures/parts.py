"""To which part of its pattern each pair of a mask belongs: what pictures colour.

A pair that several parts show belongs to the one whose entry shows it in the tile program: dense rows before sink,
sink before window, window before everything else; columns inside blocks go to the blocks, places on vertical lines to
the lines. Memory is O(S * S), S tokens, as rows or as keys.
"""

from collections.abc import Iterator
from enum import IntEnum

import torch
from msgspec.structs import replace
from torch import Tensor

from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Chosen, Lines, Unit
from sglang_mm.patterns.masks import mask
from sglang_mm.types import TokenMap


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
    i = torch.arange(len(tokens), device=tokens.modality.device)[:, None]
    j = i.T
    part_SS = torch.zeros(len(tokens), len(tokens), dtype=torch.uint8, device=i.device)
    for panel in unit.panels:
        open_SS = j <= i
        if panel.rows is not None:
            open_SS &= (tokens.modality == panel.rows)[:, None]
        if panel.keys is not None:
            open_SS &= tokens.modality == panel.keys
        for part, shown_SS in _layers(panel.pattern, tokens, panel.chosen):
            part_SS[open_SS & shown_SS] = part
            open_SS &= ~shown_SS
    return part_SS


def dense_rows(pattern: Pattern, tokens: TokenMap, chosen: Chosen) -> Tensor:
    """bool [S]: rows to which the pattern shows everything."""
    i = torch.arange(len(tokens), device=tokens.modality.device)
    match pattern:
        case Dense():
            return i >= 0
        case TriShape():
            return i >= len(tokens) - pattern.last
        case Grid():
            on_line_S = _of_classes(tokens, chosen) & pattern.horizontal
            return on_line_S | (i >= tokens.tail) & pattern.tail
        case _:
            return i < 0


def _layers(pattern: Pattern, tokens: TokenMap, chosen: Chosen) -> Iterator[tuple[Part, Tensor]]:
    """(part, pairs it shows: bool that broadcasts to [S, S]), the part that has a pair first."""
    i = torch.arange(len(tokens), device=tokens.modality.device)[:, None]
    j = i.T
    yield Part.DENSE_ROWS, dense_rows(pattern, tokens, chosen)[:, None]
    if isinstance(pattern, AShape | TriShape | VerticalSlash | Grid):
        yield Part.SINK, j < pattern.sink
        yield Part.WINDOW, i - j < pattern.window
    match pattern:
        case VerticalSlash():
            yield Part.SLASH, _slash(pattern, tokens, Lines(chosen.columns[:0], chosen.diagonals))
            yield Part.LINES, torch.isin(j, chosen.columns.to(i.device))
        case Grid():
            yield Part.SEPARATORS, tokens.separators[None, :]
            yield Part.LINES, (_of_classes(tokens, chosen) & pattern.vertical)[None, :]
            if pattern.slash:
                yield Part.SLASH, _slash(replace(pattern, vertical=False, horizontal=False, tail=False), tokens, chosen)
        case Blocks():
            yield Part.BLOCKS, mask(pattern, tokens, chosen)


def _slash(pattern: VerticalSlash | Grid, tokens: TokenMap, chosen: Chosen) -> Tensor:
    """What is left of the mask without sink and window. The diagonal stays, which is the window's by now."""
    return mask(replace(pattern, sink=0, window=1), tokens, chosen)


def _of_classes(tokens: TokenMap, chosen: Chosen) -> Tensor:
    """bool [S]: tokens of a chosen class."""
    class_S = tokens.classes(chosen.axis).of_token.long()
    return torch.isin(class_S, chosen.classes.to(class_S.device))
