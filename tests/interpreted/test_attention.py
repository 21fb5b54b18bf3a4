"""The attention kernel in the interpreter, against the reference executor and the masks it is proved with."""

import pytest
import torch
from hypothesis import Phase, assume, given, settings

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention, empty_state, merge, sparse_attention
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.kernels.triton_backend import launch, works
from sglang_mm.kernels.triton_backend.configs import Config
from sglang_mm.types import INF
from tests.exactness.layers import SCALE, Layer
from tests.exactness.oracle import allowed, errors, exact, largest, masked
from tests.exactness.strategies import layers, seeds
from tests.exactness.tables import Item, tile_program
from tests.kernels import oracle
from tests.kernels.test_causal_attention import POSITIONS
from tests.kernels.test_causal_attention import draw as draw_causal
from tests.kernels.test_tiles import CAUSAL, FIRST, KEYS, NAN, POS_K, POS_Q, ROWS, SECOND, TWO_UNITS, draw, drawn

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
LARGE_STEPS = Config(128, 64, 4, 2, tma=False)
HALF_TILES = Config(64, 32, 4, 3, tma=False)


@pytest.fixture
def large_steps(monkeypatch):
    """fp32 in the steps of 16-bit numbers, which take the interpreter a tenth of the time."""
    monkeypatch.setattr(launch, "choose_config", lambda *_: LARGE_STEPS)


@pytest.fixture
def small_parts(monkeypatch):
    """Items of two visits and more are split."""
    monkeypatch.setattr(works, "SHORTEST", 1)
    monkeypatch.setattr(launch, "_processors", lambda _: 3)


def run(q, k, v, program, state=None):
    out, lse = empty_state(q) if state is None else state
    launch.attend(q, k, v, program, SCALE, out, lse)
    return out, lse


def assert_exact(actual, q, k, v, seen_HTK, merges: int = 1) -> None:
    """As the reference must be, but 16-bit inputs: the weights are rounded to them before they meet the values, each by
    half an eps, so that a mean of values is off by that times the largest value."""
    expected = exact(q, k, v, seen_HTK)
    limits = allowed(expected, q, k, v, seen_HTK, torch.float32, merges)
    if q.dtype == torch.float16:
        limits[0] += torch.finfo(q.dtype).eps / 2 * largest(v)
    for name, error, limit in zip(("out", "lse"), errors(actual, expected), limits):
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values(dtype, dim):
    q, k, v = draw(3, 1, dtype, dim)
    assert_exact(run(q, k, v, TWO_UNITS), q, k, v, drawn(FIRST, FIRST, SECOND))


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_heads_meet_the_keys_of_their_group(group):
    """Units of all heads of a K/V head, and of single ones."""
    rest = tuple(range(group + 1, 2 * group))
    heads = (tuple(range(group)), (group,), *([rest] if rest else []))
    items = [Item(unit, 1, full=[(unit, 1)]) for unit in range(len(heads))]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=heads, group=group)
    q, k, v = draw(2 * group, 2, torch.float16, 64)
    pictures = ["..... xx... ..... .....", "..... ..x.x ..... .....", "..... ...x. ..... ....."]
    shown = drawn(*[pictures[unit] for unit, each in enumerate(heads) for _ in each])
    assert_exact(run(q, k, v, program), q, k, v, shown)


def test_bits_of_a_whole_tile(large_steps):
    q, _, _ = draw(1, 1, torch.float32)
    k, v = torch.randn(2, 130, 1, 8, generator=torch.Generator().manual_seed(1))
    for first in range(3):
        live = list(range(first, 128, 3))
        part = [(1, 1, CAUSAL, None), (0, 1, CAUSAL, live)]
        program = tile_program(POS_Q + 200, torch.arange(130), ROWS, [range(2, 130), [0]], [Item(0, 0, part=part)])
        shown = torch.zeros(1, 4, 130, dtype=torch.bool)
        shown[0, [[0], [2]], [0, *(key + 2 for key in live)]] = True
        assert_exact(run(q, k, v, program), q, k, v, shown)


def test_keys_of_no_entry_and_rows_of_no_item_are_never_read(large_steps):
    q, k, v = draw(3, 1, torch.float32)
    items = [Item(0, 0, full=[(0, 1)], part=[(2, 1, CAUSAL, None)])]
    program = tile_program(POS_Q, POS_K, ROWS, KEYS, items, heads=((0, 1, 2),), group=3)
    k[[2, 4]], v[[2, 4]], q[[1, 3]] = NAN, NAN, NAN
    out, lse = run(q, k, v, program)
    assert out.isfinite().all() and lse[:, [0, 2]].isfinite().all()


def test_scores_too_large_for_exp(large_steps):
    q, k, v = draw(3, 1, torch.float32)
    out, lse = run(q * 1e4, k, v, TWO_UNITS)
    want, lse_want = attend_tiles(q.double() * 1e4, k.double(), v.double(), TWO_UNITS, scale=SCALE)
    assert out.isfinite().all() and float(lse.max()) > 1e3
    assert float((out - want).abs().max()) < float(lse_want[lse_want.isfinite()].abs().max()) * 2**-23 * 16


def test_nan_is_not_taken_for_a_row_without_keys(small_parts):
    """Rows that see a NaN are NaN, with one part or several; others are not."""
    q, k, v = draw(1, 1, torch.float32)
    k[3] = NAN
    items = [Item(0, 0, full=[(0, 4)]), Item(0, 1, full=[(0, 2)])]
    program = tile_program(POS_Q, POS_K, ROWS, [[0], [1], [3], [2]], items)
    for each in (run(q, k, v, program), attend_tiles(q, k, v, program, scale=SCALE)):
        assert each[0][[0, 2], 0].isnan().all() and each[1][0, [0, 2]].isnan().all()
        assert each[0][[1, 3]].isfinite().all() and not each[1][:, [1, 3]].isnan().any()


def test_split_halves_of_a_tile(small_parts, monkeypatch):
    """128 rows in steps of 64, in parts: each half has slots of its own."""
    monkeypatch.setattr(launch, "choose_config", lambda *_: HALF_TILES)
    draw_from = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 128, 2, 8, generator=draw_from)
    items = [Item(0, 0, full=[(0, 3)], part=[(3, 1, CAUSAL, None)])]
    keys = [range(first, first + 32) for first in range(0, 128, 32)]
    program = tile_program(torch.arange(128), torch.arange(128), [range(128)], keys, items, ((0, 1),), 2)
    shown = torch.ones(2, 128, 128, dtype=torch.bool)
    shown[..., 96:] = (torch.arange(128)[:, None] >= torch.arange(96, 128)).expand(2, -1, -1)
    assert_exact(run(q, k[:, :1], v[:, :1], program), q, k[:, :1], v[:, :1], shown)


def test_rows_of_queries_may_have_any_stride(large_steps):
    q, k, v = draw(3, 1, torch.float32)
    fused = torch.full((4, 9, 16), NAN)
    fused[:, 1:8:3, 4:12] = q
    head_major = q.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (fused[:, 1:8:3, 4:12], head_major, q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert all(map(torch.equal, run(strided, k, v, TWO_UNITS), run(q, k, v, TWO_UNITS)))


def test_a_program_is_added_to_a_state(large_steps):
    """Rows that it shows nothing to keep theirs, bit for bit; out of rows that had none is not read."""
    q, k, v = draw(3, 1, torch.float32)
    had = torch.tensor([True, False, True, True])
    out, lse = torch.randn(4, 3, 8).masked_fill(~had[:, None, None], NAN), torch.randn(3, 4)
    lse[:, ~had] = float("-inf")
    before = out.clone(), lse.clone()
    want = out.nan_to_num(), lse.clone()
    mine = run(q, k, v, TWO_UNITS)
    merge(*want, *mine)
    out, lse = run(q, k, v, TWO_UNITS, (out, lse))
    added = mine[1] > float("-inf")
    eps = torch.finfo(torch.float32).eps
    assert (out - want[0]).abs().masked_fill(~added.T[..., None], 0).max() <= 4 * eps * largest(want[0])
    assert (lse - want[1])[added].abs().max() <= 4 * eps * max(1, largest(want[1]))
    assert torch.equal(out[~added.T].nan_to_num(), before[0][~added.T].nan_to_num())
    assert torch.equal(lse[~added], before[1][~added])


def test_nothing_to_attend():
    q, k, v = draw(1, 1, torch.float32)
    for items in ([], [Item(0, 0)], [Item(0, 0, part=[(0, 1, (900, INF, 0, INF), None)])]):
        out, lse = run(q, k, v, tile_program(POS_Q, POS_K, ROWS, KEYS, items))
        assert not out.any() and lse.tolist() == [[float("-inf")] * 4]


@settings(deadline=None, max_examples=8, phases=[Phase.explicit, Phase.generate])  # to shrink would take minutes
@given(layers(), seeds)
def test_compiled_programs(steps_and_parts, layer: Layer, seed):
    """Any pattern, boundary, head group and ownership; of each layer the first program that is neither empty nor long.
    The reference is proved on all of them."""
    found = [placed for placed in layer.programs[:8] if 0 < _visits(placed[2]) <= 100]
    assume(found)
    rows, keys, program = found[0]
    q, k, v = (each[at] for each, at in zip(layer.random_qkv(torch.float32, seed), (rows, keys, keys)))
    want = attend_tiles(q.double(), k.double(), v.double(), program, scale=SCALE)
    plain = attend_tiles(q, k, v, program, scale=SCALE)
    lse = torch.full_like(plain[1], float("-inf"))
    launch.add_lse(q, k, program, SCALE, lse)
    eps = torch.finfo(torch.float32).eps
    score = SCALE * largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    for name, got, wanted, same_dtype in zip(
        ("out", "lse", "lse alone"), (*run(q, k, v, program), lse), (*want, want[1]), (*plain, plain[1])
    ):
        assert torch.equal(got.isinf(), wanted.isinf()), name
        limit = 2 * largest(same_dtype - wanted) + eps * (score + 2) * max(1, largest(wanted))  # as `allowed` says
        assert largest(got - wanted) <= limit, name


def _visits(program) -> int:
    """Of pairs of 128 rows and 64 keys, for each head of a unit."""
    heads = torch.tensor([len(unit) for unit in program.heads])[program.item_unit.long()]
    tiles = program.full_count.sum() + program.part_count.sum()
    return int(heads.max() * tiles * 2) if len(heads) else 0


@pytest.fixture(scope="module", params=["whole items", "split items", "split items, half tiles"])
def steps_and_parts(request):
    config = HALF_TILES if "half" in request.param else LARGE_STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose_config", lambda *_: config)
        if "split" in request.param:
            patch.setattr(works, "SHORTEST", 1)
            patch.setattr(launch, "_processors", lambda _: 3)
        yield


@pytest.mark.parametrize(
    "name", ["own piece with a jump", "some rows see nothing", "stripes, other rank", "one of each"]
)
def test_causal_attention(name, small_parts):
    positions = POSITIONS[name]
    q, k, v = draw_causal(*positions, (6, 2, 80), torch.float16)
    out, lse = causal_attention(q, k, v, *positions, scale=0.21, backend="triton")
    want = oracle.exact(q, k, v, *positions, 0.21)
    limits = oracle.tolerances(want, q, k, v, *positions, 0.21, torch.float32, merges=1)
    assert torch.equal(lse.isinf(), want[1].isinf())
    assert largest(out - want[0]) <= limits[0] + torch.finfo(q.dtype).eps / 2 * largest(v)
    assert largest((lse - want[1])[want[1].isfinite()]) <= limits[1]


def test_what_is_compared_notices_a_lost_entry(large_steps):
    q, k, v = draw(3, 1, torch.float32)
    wrong = drawn(FIRST, FIRST.replace("xxx.x", "xxx.."), SECOND)
    with pytest.raises(AssertionError, match="out: error"):
        assert_exact(run(q, k, v, TWO_UNITS), q, k, v, wrong)
    assert masked(q, k, v, wrong)[0].isfinite().all()


def test_bf16_is_refused_here():
    q, k, v = draw(3, 1, torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16 in the interpreter"):
        sparse_attention(q, k, v, [TWO_UNITS], scale=SCALE, backend="triton")
