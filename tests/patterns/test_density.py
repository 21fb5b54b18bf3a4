"""Counts where ranges, blocks and the prompt end on the same token or next to it, and a million tokens."""

from itertools import product

import pytest
import torch

from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.patterns.density import density, pairs
from sglang_mm.patterns.masks import mask
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map

EDGES = [1, 2, 127, 128, 129, 255, 256, 257, 1000]


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize("tokens", [token_map(Text(300)), token_map(Text(100), Media(4, 1, 71))], ids=["300", "384"])
@pytest.mark.parametrize("diagonals", [(0,), (1, 2), (0, 1, 2)])
def test_counts_at_borders_of_blocks(tokens, diagonals):
    chosen = Lines(long(0, 60, 200), long(*diagonals))
    for sink, window in product([0, *EDGES], EDGES):
        pattern = VerticalSlash(sink=sink, window=window)
        assert pairs(pattern, tokens, chosen) == int(mask(pattern, tokens, chosen).sum()), pattern


def test_counts_by_hand():
    tokens = token_map(Text(1), Media(frames=2, rows=1, cols=3), Text(1))  # t p0 p1 p2 p0 p1 p2 t
    phases = Phases(Axis.FRAME, long(1), torch.tensor([[0, 1]]))
    assert pairs(Dense(), tokens, Nothing()) == 36
    assert pairs(Dense(), tokens, Nothing(), Modality.VIDEO, Modality.TEXT) == 6
    assert pairs(AShape(1, 2), tokens, Nothing()) == 1 + 2 + 6 * 3
    assert pairs(Grid(sink=0, window=1, tail=False), tokens, phases) == 8 + 5 + 2
    assert pairs(Grid(vertical=False, slash=1, sink=0, window=1, tail=False), tokens, phases) == 8 + 7
    assert pairs(Blocks(), tokens, BlockSet(long(0), long(0, 1), long(0))) == 36
    near = Panel(Modality.VIDEO, Modality.VIDEO, AShape(0, 1), Nothing())
    assert density(Unit((0, 1), (near,)), tokens) == 6 / 36


def test_a_million_tokens_need_no_table():
    """Against closed forms: p tokens a frame, n frames. A table would have 10^12 entries."""
    n, p = 4096, 256
    size, window = n * p, 1024
    tokens = token_map(Media(n, 16, 16))
    near = window * (window + 1) // 2 + (size - window) * window
    assert pairs(AShape(0, window), tokens, Nothing()) == near
    lines = sum(size - (frame * p + 7) - window for frame in range(n) if frame * p + 7 + window < size)
    assert pairs(Grid(sink=0, window=window), tokens, Phases(Axis.FRAME, long(7), long().view(-1, 2))) == near + lines
    same = p * sum(max(0, frame - window // p + 1) for frame in range(n))  # the same place, 4 frames back or more
    shifts = Phases(Axis.FRAME, long(), torch.tensor([[0, 0]]))
    assert pairs(Grid(vertical=False, slash=1, sink=0, window=window), tokens, shifts) == near + same
    blocks = size // 128 - 64  # rows of block b see block b - 64, which is beyond the window
    assert pairs(VerticalSlash(sink=0, window=window), tokens, Lines(long(), long(64))) == near + blocks * 128 * 128
