"""The dense case as a tile program, by the reference executor; and the order in which keys are packed."""

import pytest
import torch

from sglang_mm.kernels.causal import causal_program
from sglang_mm.kernels.packing import pack, packing_order
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.types import INF
from tests.kernels.oracle import assert_matches
from tests.kernels.test_causal_attention import HEADS, POSITIONS, draw
from tests.kernels.test_tiles import KEYS, POS_K, TWO_UNITS

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NOT_EMPTY = {name: each for name, each in POSITIONS.items() if all(map(len, each))}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("positions", NOT_EMPTY.values(), ids=NOT_EMPTY)
def test_values(positions, heads):
    q, k, v = draw(*positions, heads, torch.float32)
    program = causal_program(*positions, heads[1], heads[0] // heads[1])
    assert_matches(attend_tiles(q, k, v, program, scale=0.21), q, k, v, *positions, 0.21)


def test_few_tiles_have_a_mask():
    """Of 1000 rows that follow each other, the eight tiles on the diagonal."""
    positions = torch.arange(1000)
    program = causal_program(positions, positions, 1, 1)
    assert program.part_count.tolist() == [1] * 8 and program.full_count.tolist() == list(range(8))


def test_packed_one_after_another():
    order = packing_order(TWO_UNITS)
    assert order.index.tolist() == [key for tile in KEYS for key in tile] == [0, 1, 4, 2, 3]
    assert order.pos.tolist() == POS_K[order.index].tolist() and order.start.tolist() == [0, 2, 4, 5]
    k, v = torch.randn(2, 5, 2, 8)
    packed = pack(k, v, order)
    assert torch.equal(packed.k_NHD, k[[0, 1, 4, 2, 3]]) and torch.equal(packed.v_NHD, v[[0, 1, 4, 2, 3]])
    assert pack(k, None, order).v_NHD is None


def test_packed_tile_by_tile():
    """Padding holds keys of the piece, at no position."""
    order = packing_order(TWO_UNITS, align=4)
    assert order.start.tolist() == [0, 4, 8, 12] and order.pos.tolist() == [
        *[0, 3, INF, INF], *[9, 5, INF, INF], *[8, INF, INF, INF]
    ]  # fmt: skip
    assert order.index.view(3, 4)[:, 0].tolist() == [0, 4, 3] and order.index[[1, 5]].tolist() == [1, 2]
    assert bool(((order.index >= 0) & (order.index < 5)).all())
