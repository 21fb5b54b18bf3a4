"""A plan that leaves nothing out is dense causal attention, whatever pattern says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.kernels import causal_attention
from sglang_mm.patterns.boundary import Boundary2D, QBoundary, panels
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Lines, Nothing, Panel, Phases, Selection, Unit
from sglang_mm.types import INF, Axis, TokenMap
from tests.exactness.layers import SCALE, Layer, single
from tests.exactness.oracle import allowed, errors, exact
from tests.exactness.strategies import ownership, prompts, tiles

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


def full_plans(tokens: TokenMap) -> dict[str, Unit]:
    """One unit for each way to say: everything."""
    blocks = torch.arange(-(-len(tokens) // BLOCK))
    every, none = torch.arange(len(tokens)), torch.zeros(0, dtype=torch.int64)
    lower = torch.tril(torch.ones(len(blocks), len(blocks), dtype=torch.bool)).nonzero()[:, 1]
    listed = BlockSet(blocks, torch.cat([blocks[:1], (blocks + 1).cumsum(0)]), lower)
    found = {
        "dense": single(Dense()),
        "window": single(AShape(0, INF)),
        "sink": single(AShape(INF, 1)),
        "last rows": single(TriShape(0, 1, INF)),
        "columns": single(VerticalSlash(0, 0, 0, 1), Lines(every, none)),
        "diagonals": single(VerticalSlash(0, 0, 0, 1), Lines(none, blocks)),
        "columns and diagonals": single(VerticalSlash(0, 0, 3, 5), Lines(every, blocks)),
        "blocks": single(Blocks(1.0), listed),
        "window of a grid": single(Grid(window=INF), Phases(Axis.FRAME, none, none.view(0, 2))),
    }
    for plan in (QBoundary(), Boundary2D()):
        wanted = panels(plan, tokens.modalities)
        found[type(plan).__name__] = Unit((0,), tuple(Panel(a, b, each, Nothing()) for a, b, each in wanted))
    return found


@settings(deadline=None, max_examples=7)
@given(st.data(), prompts, tiles, tiles)
def test_a_full_plan_is_causal_attention(data, tokens, row_tile, key_tile):
    rows = data.draw(ownership(tokens))
    units = tuple(Unit((head,), unit.panels) for head, unit in enumerate(full_plans(tokens).values()))
    layer = Layer(tokens, Selection(units, len(units)), rows, rows, row_tile, key_tile)
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    assert torch.equal(layer.times_shown(), causal.byte().expand(len(units), -1, -1))

    qkv, position = layer.random_qkv(), torch.arange(len(tokens))
    seen_HSS = causal.expand(len(units), -1, -1)
    dense = causal_attention(*qkv, position, position, scale=SCALE, backend="reference")
    limits = allowed(exact(*qkv, seen_HSS), *qkv, seen_HSS, torch.float64, layer.merges)
    for error, limit in zip(errors(layer.attend(*qkv), dense), limits):
        assert error <= limit
