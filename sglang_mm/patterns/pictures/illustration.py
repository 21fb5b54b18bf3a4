"""Sets for pictures of a plan, where no request has been seen: evenly spaced instead of heaviest."""

from itertools import pairwise

import torch
from torch import Tensor

from sglang_mm.patterns.boundary import HeadPlan, panels
from sglang_mm.patterns.catalog import Blocks, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.patterns.program.ragged import nth, spread
from sglang_mm.types import Axis, Modality, TokenMap

EVERY_BLOCK = 4
"""The threshold of blocks does not tell how many there will be: every fourth one is shown."""


def illustrate(head_plan: HeadPlan, tokens: TokenMap) -> Unit:
    """A unit of head 0 with as many columns, diagonals, classes and shifts as the plan says. The same at every call."""
    found = panels(head_plan, tokens.modalities)
    return Unit((0,), tuple(Panel(rows, keys, each, _chosen(each, tokens, keys)) for rows, keys, each in found))


def _chosen(pattern: Pattern, tokens: TokenMap, keys: Modality | None) -> Chosen:
    blocks = -(-len(tokens) // BLOCK)
    match pattern:
        case VerticalSlash():
            first = torch.arange(len(tokens)) >= pattern.sink
            columns = (first if keys is None else first & (tokens.modality == keys)).nonzero().flatten()
            diagonals = _spaced(blocks, -(-pattern.slash // BLOCK))
            return Lines(columns[_spaced(len(columns), pattern.vertical)], diagonals)
        case Grid():
            return _phases(pattern, tokens)
        case Blocks():
            return _every_fourth(blocks)
        case _:
            return Nothing()


def _every_fourth(blocks: int) -> BlockSet:
    """Of each row block the first key block, its own, and every EVERY_BLOCK-th before that."""
    row_blocks = torch.arange(blocks)
    first = row_blocks % EVERY_BLOCK
    beside = (first > 0).long()  # then block 0 comes as one more
    counts = row_blocks // EVERY_BLOCK + 1 + beside
    place = nth(counts) - spread(beside, counts)
    key_blocks = torch.where(place < 0, 0, spread(first, counts) + EVERY_BLOCK * place)
    return BlockSet(row_blocks, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), key_blocks)


def _phases(grid: Grid, tokens: TokenMap) -> Phases:
    """`phases` classes and `slash` shifts of each name space; the shift of none, 0, is the first."""
    axis = Axis.FRAME if grid.axis == "auto" else Axis(grid.axis)
    starts = tokens.classes(axis).starts
    lines = grid.phases if grid.vertical or grid.horizontal else 0
    classes, shifts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 2, dtype=torch.int64)]
    for space, (start, stop) in enumerate(pairwise(starts)):
        between = _spaced(stop - start, lines) + (stop - start) // (2 * lines or 1)
        classes.append(start + between)
        shift = _spaced(stop - start, grid.slash)
        shifts.append(torch.stack([torch.full_like(shift, space), shift], 1))
    return Phases(axis, torch.cat(classes), torch.cat(shifts))


def _spaced(count: int, wanted: int) -> Tensor:
    """int64, ascending: at most `wanted` of the numbers below `count`, evenly spaced from 0."""
    return torch.arange(min(count, wanted)) * count // max(1, min(count, wanted))
