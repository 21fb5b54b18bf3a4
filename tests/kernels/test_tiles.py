"""The executor on programs written by hand, against dense softmax over masks drawn by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.tiles import attend_tiles, tile_lse
from sglang_mm.types import INF
from tests.exactness.layers import SCALE
from tests.exactness.oracle import assert_exact
from tests.exactness.tables import Item, tile_program

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NAN = float("nan")
CAUSAL = (0, INF, 0, INF)
POS_Q, POS_K = torch.tensor([2, 5, 9, 11]), torch.tensor([0, 3, 5, 8, 9])
ROWS, KEYS = [[0, 2], [1]], [[0, 1], [4, 2], [3]]
"""Row 3 is in no tile; the second tile of keys is not in order, which no entry needs."""


def draw(heads: int, kv_heads: int, dtype=torch.float64, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (len(POS_Q), heads), (len(POS_K), kv_heads), (len(POS_K), kv_heads)
    return tuple(torch.randn(*size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def drawn(*units: str) -> Tensor:
    """bool [units, T, K] of one picture per unit."""
    return torch.tensor([[[key == "x" for key in row] for row in unit.split()] for unit in units])


TWO_UNITS = tile_program(
    POS_Q, POS_K, ROWS, KEYS,
    [
        Item(0, 0, full=[(0, 1)], part=[(1, 2, (0, 4, 0, INF), None)]),
        Item(0, 1, full=[(0, 2)], part=[(2, 1, CAUSAL, None)]),
        Item(1, 0, part=[(0, 1, CAUSAL, [1]), (1, 1, (1, INF, 3, 9), None)]),
        Item(1, 1),
    ],
    heads=((0, 1), (2,)), group=3,
)  # fmt: skip
FIRST, SECOND = "xx... xxx.x xx.xx .....", "..... ..... .xx.. ....."


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values(dtype):
    q, k, v = draw(3, 1, dtype)
    state = attend_tiles(q, k, v, TWO_UNITS, scale=SCALE)
    assert state[0].dtype == state[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_exact(state, q, k, v, drawn(FIRST, FIRST, SECOND), merges=1)


def test_rows_without_keys_are_zero_and_minus_infinity():
    """In no tile, in a tile without entries, and where bounds or bits hide all keys."""
    out, lse = attend_tiles(*draw(3, 1), TWO_UNITS, scale=SCALE)
    for head, rows in ((0, [3]), (2, [0, 1, 3])):
        assert not out[rows, head].any() and lse[head, rows].tolist() == [float("-inf")] * len(rows)


def test_the_log_sum_exp_alone():
    q, k, v = draw(3, 1, torch.float32)
    assert torch.equal(tile_lse(q, k, TWO_UNITS, scale=SCALE), attend_tiles(q, k, v, TWO_UNITS, scale=SCALE)[1])


def test_heads_meet_the_keys_of_their_group():
    """Four query heads, two per K/V head; a unit is a head, or the two of one K/V head."""
    items = [Item(0, 1, full=[(0, 1)]), Item(1, 1, full=[(2, 1)]), Item(2, 1, full=[(1, 1)])]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=((2, 3), (0,), (1,)), group=2)
    q, k, v = draw(4, 2)
    shown = drawn("..... ...x. ..... .....", "..... ..x.x ..... .....", *["..... xx... ..... ....."] * 2)
    assert_exact(attend_tiles(q, k, v, program, scale=SCALE), q, k, v, shown, merges=1)


def test_bits_of_a_whole_tile():
    """128 keys, of which every third is live: lowest, highest and the two in the middle among them or not."""
    q, _, _ = draw(1, 1)
    k, v = torch.randn(2, 130, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for first in range(3):
        live = list(range(first, 128, 3))
        part = [(1, 1, CAUSAL, None), (0, 1, CAUSAL, live)]
        program = tile_program(POS_Q + 200, torch.arange(130), ROWS, [range(2, 130), [0]], [Item(0, 0, part=part)])
        shown = torch.zeros(1, 4, 130, dtype=torch.bool)
        shown[0, [[0], [2]], [0, *(key + 2 for key in live)]] = True
        assert_exact(attend_tiles(q, k, v, program, scale=SCALE), q, k, v, shown, merges=1)


def test_keys_of_no_entry_are_never_read():
    q, k, v = draw(3, 1)
    items = [Item(0, 0, full=[(0, 1)], part=[(2, 1, CAUSAL, None)])]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=((0, 1, 2),), group=3)
    k[[2, 4]], v[[2, 4]], q[[1, 3]] = NAN, NAN, NAN
    out, lse = attend_tiles(q, k, v, program, scale=SCALE)
    assert out.isfinite().all() and lse[:, [0, 2]].isfinite().all()


def test_scores_too_large_for_exp():
    q, k, v = draw(3, 1, torch.float32)
    out, lse = attend_tiles(q * 1e4, k, v, TWO_UNITS, scale=SCALE)
    assert out.isfinite().all() and float(lse.max()) > 1e3


def test_nothing_to_attend():
    rows, keys = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    program = tile_program(rows, keys, [], [], [])
    out, lse = attend_tiles(*torch.zeros(3, 0, 1, 8), program, scale=SCALE)
    assert out.shape == (0, 1, 8) and lse.shape == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (5, 3, 8)}, "5 rows and 5 keys.*4 and 5"),
        ({"k": (6, 1, 8)}, "4 rows and 6 keys.*4 and 5"),
        ({"q": (4, 2, 8)}, r"q \(4, 2, 8\).*3 query heads per K/V head"),
        ({"q": (4, 3, 9)}, "one head dim"),
        ({"v": (4, 1, 8)}, r"v \(4, 1, 8\).*\(5, 1, 8\)"),
        ({"v": (5, 2, 8)}, r"v \(5, 2, 8\).*\(5, 1, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (4, 3, 8), "k": (5, 1, 8), "v": (5, 1, 8)} | change
    with pytest.raises(ConfigError, match=message):
        attend_tiles(*(torch.zeros(shape) for shape in shapes.values()), TWO_UNITS, scale=SCALE)


def test_dtypes_that_differ_are_refused():
    q, k, v = draw(3, 1)
    for wrong in ((q, k.float(), v), (q, k, v.half()), (q.bfloat16(), k, v)):
        with pytest.raises(ConfigError, match=r"float64.*one dtype and one device"):
            attend_tiles(*wrong, TWO_UNITS, scale=SCALE)


def test_units_of_other_heads_are_refused():
    program = replace(TWO_UNITS, heads=((0, 1), (3,)))
    with pytest.raises(ConfigError, match=r"heads 0 \.\. 2.*heads of units up to 3"):
        attend_tiles(*draw(3, 1), program, scale=SCALE)
