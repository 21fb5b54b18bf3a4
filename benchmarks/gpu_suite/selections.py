"""Fixed selections of one layer, as the online selection would find them: what is timed, and what is checked.

Timed: per group of 7 query heads five grids (lines through some places of every frame, as keys and as rows, each head
its own places) and two vertical_slash heads, sized so that each computes about the wanted share of the causal pairs.
"""

import torch
from torch import Tensor

from benchmarks.gpu_suite.prompts import Prompt
from sglang_mm.patterns.catalog import Dense, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, Chosen, Lines, Nothing, Panel, Phases, Selection, Unit
from sglang_mm.patterns.density import density
from sglang_mm.types import Axis, Modality

SINK = 64
WINDOW = 1024
"""Tokens, at most: short prompts at low density have smaller windows."""
SLASH_HEADS = (2, 5)
"""Of each seven heads, those with vertical_slash."""


def dense_selection(heads: int, kv_heads: int) -> Selection:
    return Selection(tuple(Unit((head,), (whole(Dense()),)) for head in range(heads)), heads // kv_heads)


def layer_selection(prompt: Prompt, heads: int, kv_heads: int, share: float, seed: int = 0) -> Selection:
    """One unit per head. share: of the causal pairs, 0 < share < 1; what comes out is `mean_density`."""
    draw = torch.Generator().manual_seed(seed)
    units = []
    for head in range(heads):
        make = _lines if head % 7 in SLASH_HEADS else _grid
        units.append(Unit((head,), (make(prompt, share, draw),)))
    return Selection(tuple(units), heads // kv_heads)


def mean_density(selection: Selection, prompt: Prompt) -> float:
    """Of the causal pairs, over all heads; exact."""
    heads = sum(len(unit.heads) for unit in selection.units)
    return sum(density(unit, prompt.tokens) * len(unit.heads) for unit in selection.units) / heads


def whole(pattern: Pattern, chosen: Chosen | None = None) -> Panel:
    """The panel of all rows and all keys."""
    return Panel(None, None, pattern, chosen or Nothing())


def some(count: int, below: int, draw: torch.Generator, prompt: Prompt) -> Tensor:
    """int64, ascending, on the prompt's device: `count` different numbers, or all of them."""
    return torch.randperm(below, generator=draw)[:count].sort().values.to(prompt.tokens.modality.device)


def _grid(prompt: Prompt, share: float, draw: torch.Generator) -> Panel:
    """A class of n takes 1 / n of the keys and as many of the rows."""
    tokens = prompt.tokens
    window = _window(prompt, share)
    tail = sum(run.length for run in prompt.runs if run.modality == "text" and run.stop == len(prompt))
    left = share - 2 * (window + SINK + tail) / len(prompt)
    classes = len(tokens.classes(Axis.FRAME))
    video = int((tokens.modality == Modality.VIDEO).sum()) / len(prompt)
    phases = min(max(1, round(left * classes / (2 * video))), classes)
    pattern = Grid(axis="frame", vertical=True, horizontal=True, phases=phases, sink=SINK, window=window)
    lines = some(phases, classes, draw, prompt)
    return whole(pattern, Phases(Axis.FRAME, lines, lines.new_zeros(0, 2)))


def _lines(prompt: Prompt, share: float, draw: torch.Generator) -> Panel:
    """Half of what the window leaves on columns, half on block diagonals; drawn evenly, each has half a prompt."""
    size, blocks = len(prompt), len(prompt) // BLOCK
    window = _window(prompt, share)
    left = max(0.0, share - 2 * (window + SINK) / size)
    columns, diagonals = max(1, round(left / 2 * size)), max(1, round(left / 2 * blocks))
    pattern = VerticalSlash(vertical=columns, slash=diagonals * BLOCK, sink=SINK, window=window)
    lines = Lines(some(columns, size, draw, prompt), some(diagonals, max(blocks, 1), draw, prompt))
    return whole(pattern, lines)


def _window(prompt: Prompt, share: float) -> int:
    """A quarter of the pairs at most, in blocks."""
    return min(WINDOW, max(1, round(share * len(prompt) / 8 / BLOCK)) * BLOCK)
