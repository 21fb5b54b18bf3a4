"""Random programs that no compiler made: the executor shows what their tables say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.kernels import sparse_attention
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.types import INF, TileProgram
from tests.exactness.decode import times_shown
from tests.exactness.layers import SCALE
from tests.exactness.oracle import assert_exact
from tests.exactness.tables import Item, tile_program

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
limits = st.integers(-5, 60)


def parts(draw, count: int, longest: int) -> list[list[int]]:
    """All numbers below count, each once, in tiles."""
    order = draw(st.permutations(range(count)))
    tiles = []
    while order:
        size = draw(st.integers(1, longest))
        tiles.append(sorted(order[:size]))
        order = order[size:]
    return tiles


@st.composite
def programs(draw) -> TileProgram:
    """Two units of two heads; an item meets each tile of keys once at most, full or with a mask."""
    pos_q, pos_k = (
        torch.tensor(sorted(draw(st.sets(st.integers(0, 60), max_size=count))), dtype=torch.int64) for count in (12, 40)
    )
    rows, keys = parts(draw, len(pos_q), 8), parts(draw, len(pos_k), 40)
    items = []
    for unit in range(2):
        for tile in range(len(rows)):
            item = Item(unit, tile, full=[], part=[])
            for number, each in enumerate(keys):
                kind = draw(st.sampled_from(["none", "full", "bounds", "bits"]))
                if kind == "full":
                    item.full.append((number, 1))
                elif kind != "none":
                    bounds = draw(st.tuples(limits, limits | st.just(INF), limits, limits | st.just(INF)))
                    live = draw(st.sets(st.sampled_from(range(len(each))))) if kind == "bits" else None
                    item.part.append((number, 1, bounds, live))
            items.append(item)
    return tile_program(pos_q, pos_k, rows, keys, items, heads=((0, 1), (2, 3)), group=2)


@settings(deadline=None, max_examples=60)
@given(programs(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(0, 999))
def test_any_program(program: TileProgram, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(len(program.pos_q), 4, 8, generator=draw, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, len(program.pos_k), 2, 8, generator=draw, dtype=torch.float64).to(dtype)
    shown = times_shown(program)
    assert int(shown.max()) <= 1 if shown.numel() else True
    state = attend_tiles(q, k, v, program, scale=SCALE)
    seen = shown.bool().repeat_interleave(2, 0)
    assert_exact(state, q, k, v, seen, merges=1)
    if dtype != torch.float64:
        assert_exact(sparse_attention(q, k, v, [program], scale=SCALE, backend="cpu"), q, k, v, seen, merges=1)
