"""No mask depends on how rows and keys are cut into tiles."""

from dataclasses import replace

import pytest
import torch

from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Nothing, Panel, Phases, Selection, Unit
from sglang_mm.types import Axis, Modality
from tests import token_maps
from tests.exactness.layers import Layer, single
from tests.exactness.oracle import assert_exact
from tests.exactness.strategies import runs

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TEXT, IMAGE, VIDEO = Modality
SIZES = [1, 17, 64, 100, 128]


def every_pattern() -> Layer:
    """510 tokens with newlines, timestamps, a video, an image and another video, over 3 ranks."""
    tokens = token_maps.tiny_mixed()
    lines = Lines(torch.arange(7, 500, 11), torch.tensor([0, 2]))
    blocks = BlockSet(torch.arange(4), torch.tensor([0, 1, 3, 5, 8]), torch.tensor([0, 0, 1, 0, 2, 0, 1, 3]))
    phases = Phases(Axis.FRAME, torch.tensor([2, 20, 40]), torch.tensor([[0, 3], [1, 1], [1, 34]]))
    columns = Phases(Axis.ROW, torch.tensor([1, 6]), torch.tensor([[0, 1], [2, 3]]))
    pairs = [Panel(rows, keys, VerticalSlash(sink=3, window=9), lines) for rows in Modality for keys in Modality]
    pairs[0] = Panel(TEXT, TEXT, AShape(7, 20), Nothing())
    pairs[-1] = Panel(VIDEO, VIDEO, Grid(horizontal=True, slash=2, sink=4, window=30), phases)
    units = (
        single(Dense()),
        single(AShape(5, 40)),
        single(TriShape(5, 40, 33)),
        single(VerticalSlash(sink=9, window=60), lines),
        single(Grid(slash=3, sink=6, window=25), phases),
        single(Grid("row", horizontal=True, slash=2, sink=0, window=1, tail=False), columns),
        single(Blocks(), blocks),
        Unit((0,), tuple(pairs)),
    )
    units = tuple(replace(unit, heads=(head,)) for head, unit in enumerate(units))
    rows = make_layout(runs(tokens), 3).rows
    return Layer(tokens, Selection(units, 8), rows, rows)


@pytest.mark.parametrize("row_tile", SIZES)
def test_masks_do_not_depend_on_tile_sizes(row_tile):
    layer = every_pattern()
    expected = layer.masks.byte()
    for key_tile in SIZES if row_tile > 16 else [1, 128]:
        cut = replace(layer, row_tile=row_tile, key_tile=key_tile)
        assert torch.equal(cut.times_shown(), expected)
        for _, _, program in cut.programs:
            assert int(program.row_ptr.diff().max()) <= row_tile and int(program.key_ptr.diff().max()) <= key_tile


@pytest.mark.parametrize("tiles", [(3, 128), (128, 1), (65, 63)])
def test_values_do_not_depend_on_tile_sizes(tiles):
    layer = replace(every_pattern(), row_tile=tiles[0], key_tile=tiles[1])
    qkv = layer.random_qkv()
    assert_exact(layer.attend(*qkv), *qkv, layer.seen_by_head(), layer.merges)


def test_rows_that_a_pattern_makes_dense_taken_as_sparse():
    """As the recall guard runs them: last rows, horizontal lines, text tail."""
    layer = every_pattern()
    sparse = replace(layer, sparse_rows=True)
    changed = [not torch.equal(*masks) for masks in zip(layer.masks, sparse.masks)]
    assert changed == [False, False, True, False, True, True, False, True]
    assert torch.equal(sparse.times_shown(), sparse.masks.byte())
