"""The attention kernel on keys that were packed for FA4: tiles from every 128th row on, with padding between them."""

import pytest
import torch

from sglang_mm.kernels import empty_state
from sglang_mm.kernels.fa4_backend import TILE, make_plan
from sglang_mm.kernels.packing import Packer
from sglang_mm.kernels.triton_backend import launch
from sglang_mm.types import INF
from tests.exactness.layers import SCALE
from tests.exactness.oracle import assert_exact
from tests.exactness.tables import Item, tile_program
from tests.interpreted.test_attention import large_steps  # noqa: F401
from tests.kernels.fa4_twin import by_head

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread", "large_steps")


def test_values():
    """Short tiles, in full and inside runs with a mask; FA4 takes the two whole ones."""
    tiles = [range(128), range(128, 170), range(170, 298), range(298, 310)]
    part = [(0, 4, (0, INF, 20, INF), None)]
    items = [Item(0, 0, full=[(0, 4)]), Item(0, 1, full=[(1, 1)], part=[(3, 1, (0, INF, 0, INF), [0, 7])])]
    items.append(Item(1, 1, part=part))
    program = tile_program(
        torch.arange(250, 330), torch.arange(310), [range(40), range(40, 80)], tiles, items, heads=((0,), (1,)), group=2
    )
    rest = make_plan(program, 2).rest
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, heads, 16, generator=draw) for size, heads in ((80, 2), (310, 1), (310, 1)))
    state = empty_state(q)
    launch.attend_packed(q, Packer(k, v), rest, SCALE, *state, align=TILE)
    assert_exact(state, q, k, v, by_head(rest, 2).bool(), merges=1)
