"""Prompts of thousands of tokens over the layouts that ranks really get: zigzag pieces of a video, striped texts."""

from dataclasses import replace

import pytest
import torch

from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.catalog import Blocks, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.types import Axis, Modality, TokenMap
from tests import token_maps
from tests.exactness.layers import Layer, one_rank, single
from tests.exactness.oracle import assert_exact
from tests.exactness.strategies import runs

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


def units(tokens: TokenMap) -> tuple[Unit, ...]:
    """Grid with lines both ways and differences; columns across diagonals; and by modality of the rows."""
    draw = torch.Generator().manual_seed(0)
    columns = torch.randperm(len(tokens), generator=draw)[:150].sort().values
    phases = Phases(Axis.FRAME, torch.tensor([3, 17]), torch.tensor([[0, 2], [0, 30]]))
    grid = Grid("frame", horizontal=True, slash=2, sink=64, window=200)
    lines = Lines(columns, torch.tensor([1, 4, 5, 11]))
    blocks = -(-len(tokens) // BLOCK)
    listed = [torch.tensor([0, row // 2, row]).unique() for row in range(blocks)]
    block_set = BlockSet(torch.arange(blocks), torch.tensor([0, *map(len, listed)]).cumsum(0), torch.cat(listed))
    by_rows = (
        Panel(Modality.TEXT, None, TriShape(sink=10, window=300, last=64), Nothing()),
        Panel(Modality.VIDEO, None, Blocks(), block_set),
    )
    return single(grid, phases), single(VerticalSlash(sink=32, window=100), lines, heads=(1,)), Unit((2,), by_rows)


@pytest.fixture(scope="module")
def on_one_rank() -> Layer:
    """2.6 thousand tokens: enough for zigzag pieces at 8 ranks."""
    tokens = token_maps.uniform_video(39, 6, 10, newline=True)
    return one_rank(tokens, *units(tokens), group=3)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_layouts_of_ranks(on_one_rank, ranks):
    rows = make_layout(runs(on_one_rank.tokens), ranks).rows
    layer = replace(on_one_rank, rows=rows, keys=rows)
    assert torch.equal(layer.times_shown(), on_one_rank.masks.byte())
    if ranks == 7:
        qkv = layer.random_qkv(torch.float32)
        assert_exact(layer.attend(*qkv), *qkv, on_one_rank.seen_by_head(), layer.merges)


@pytest.mark.parametrize(("unit", "tokens"), [(0, 4_000), (1, 8_000), (2, 4_000)])
def test_long_prompts(unit, tokens):
    prompt = token_maps.uniform_video((tokens - 50) // 60, 6, 10)
    layer = one_rank(prompt, replace(units(prompt)[unit], heads=(0,)))
    assert torch.equal(layer.times_shown(), layer.masks.byte())


def test_more_sources_than_32_bits_can_tell_apart():
    """Items times classes times tokens are 3e9: a source for every class of every image."""
    prompt = token_maps.Prompt()
    for _ in range(400):
        prompt.image(1, 1)
    tokens = prompt.image(1, 2600).token_map()
    phases = Phases(Axis.FRAME, torch.zeros(0, dtype=torch.int64), torch.tensor([[1, 7]]))
    layer = one_rank(tokens, single(Grid("frame", vertical=False, slash=1, sink=0, window=3), phases))
    assert torch.equal(layer.times_shown(), layer.masks.byte())
