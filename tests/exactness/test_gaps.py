"""Rows and keys of one modality lie in stretches; a tile across a long gap would meet all that lies inside the gap."""

import pytest
import torch

from sglang_mm.patterns.catalog import AShape
from sglang_mm.patterns.chosen import Nothing, Panel, Selection, Unit
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from tests.token_maps import Prompt


def visits(tokens, pairs, rows: torch.Tensor) -> int:
    """Of a_shape on the (rows, keys) pairs, for these rows and all keys."""
    panels = tuple(Panel(a, b, AShape(sink=64, window=1024), Nothing()) for a, b in pairs)
    selection = Selection((Unit((0,), panels),), 1)
    everything = Shard(tokens, torch.arange(len(tokens)))
    (program,) = compile_piece(compile_rows(selection, Shard(tokens, rows)), everything)
    return program.visits


@pytest.mark.parametrize("before", [64, 100, 128])
def test_a_boundary_costs_a_few_tiles_at_its_borders(before):
    tokens = Prompt().text(before).video(200, 16, 16).text(300).token_map()
    rows = torch.arange(len(tokens))
    pairs = [(a, b) for a in tokens.modalities for b in tokens.modalities]
    assert visits(tokens, pairs, rows) <= 1.05 * visits(tokens, [(None, None)], rows)


def test_a_rank_with_an_early_and_a_late_stretch():
    """Zigzag pieces, none of which ends at a block of 128."""
    tokens = Prompt().text(20000).token_map()
    early, late = torch.arange(50, 1050), torch.arange(18050, 19050)
    apart = visits(tokens, [(None, None)], early) + visits(tokens, [(None, None)], late)
    assert visits(tokens, [(None, None)], torch.cat([early, late])) <= apart
