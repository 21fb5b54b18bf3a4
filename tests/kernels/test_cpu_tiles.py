"""The CPU backend on the cases of the reference, against dense softmax over masks."""

import pytest
import torch

from sglang_mm.kernels import cpu_tiles, empty_state, sparse_attention
from sglang_mm.types import INF
from tests.exactness.layers import SCALE, Layer
from tests.exactness.oracle import assert_exact
from tests.exactness.tables import Item, tile_program
from tests.kernels.test_fa4 import LAYERS
from tests.kernels.test_tiles import CAUSAL, FIRST, KEYS, NAN, POS_K, POS_Q, ROWS, SECOND, TWO_UNITS, draw, drawn

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(q, k, v, program, scale: float = SCALE):
    return sparse_attention(q, k, v, [program], scale=scale, backend="cpu")


@pytest.fixture(params=[1, 256])
def items_at_once(request, monkeypatch):
    monkeypatch.setattr(cpu_tiles, "ITEMS_AT_ONCE", request.param)


@pytest.mark.usefixtures("items_at_once")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype):
    """Rows without keys among them: in no tile, in a tile without entries, and where bounds or bits hide all keys."""
    q, k, v = draw(3, 1, dtype)
    state = run(q, k, v, TWO_UNITS)
    assert state[0].dtype == state[1].dtype == torch.float32
    assert_exact(state, q, k, v, drawn(FIRST, FIRST, SECOND), merges=1)
    for head, rows in ((0, [3]), (2, [0, 1, 3])):
        assert not state[0][rows, head].any() and state[1][head, rows].tolist() == [float("-inf")] * len(rows)


@pytest.mark.usefixtures("items_at_once")
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_programs(name):
    layer: Layer = LAYERS[name]
    qkv = layer.random_qkv(torch.float32)
    state = empty_state(qkv[0])
    for rows, keys, program in layer.programs:
        mine = state[0][rows], state[1][:, rows]
        sparse_attention(*(x[at] for x, at in zip(qkv, (rows, keys, keys))), [program], scale=SCALE, state=mine)
        state[0][rows], state[1][:, rows] = mine
    assert_exact(state, *qkv, layer.seen_by_head(), merges=layer.merges)


def test_heads_meet_the_keys_of_their_group():
    items = [Item(0, 1, full=[(0, 1)]), Item(1, 1, full=[(2, 1)]), Item(2, 1, full=[(1, 1)])]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=((2, 3), (0,), (1,)), group=2)
    q, k, v = draw(4, 2, torch.float32)
    shown = drawn("..... ...x. ..... .....", "..... ..x.x ..... .....", *["..... xx... ..... ....."] * 2)
    assert_exact(run(q, k, v, program), q, k, v, shown, merges=1)


def test_more_hidden_keys_than_the_kernel_takes_at_a_time():
    """PyTorch's kernel goes on in steps of 512 keys; the first ones show a row nothing."""
    keys = torch.arange(1300)
    q, k, v = (torch.randn(n, 1, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 1300, 1300))
    tiles = [range(first, min(first + 128, 1300)) for first in range(0, 1300, 128)]
    part = [(0, len(tiles), (0, INF, 1200, INF), None)]
    program = tile_program(torch.tensor([1100, 1200, 1250]), keys, [range(3)], tiles, [Item(0, 0, part=part)])
    shown = (keys >= 1200) & (keys <= torch.tensor([[1100], [1200], [1250]]))
    assert_exact(run(q, k, v, program), q, k, v, shown[None], merges=1)


def test_keys_of_no_entry_are_never_read():
    q, k, v = draw(3, 1, torch.float32)
    items = [Item(0, 0, full=[(0, 1)], part=[(2, 1, CAUSAL, None)])]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=((0, 1, 2),), group=3)
    k[[2, 4]], v[[2, 4]], q[[1, 3]] = NAN, NAN, NAN
    out, lse = run(q, k, v, program)
    assert out.isfinite().all() and lse[:, [0, 2]].isfinite().all()


def test_scores_too_large_for_exp():
    q, k, v = draw(3, 1, torch.float32)
    out, lse = run(q * 1e4, k, v, TWO_UNITS)
    assert out.isfinite().all() and float(lse.max()) > 1e3


def test_nothing_to_attend():
    nothing = torch.zeros(0, dtype=torch.int64)
    out, lse = run(*torch.zeros(3, 0, 1, 8), tile_program(nothing, nothing, [], [], []))
    assert out.shape == (0, 1, 8) and lse.shape == (1, 0)
