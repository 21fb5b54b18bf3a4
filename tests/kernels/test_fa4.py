"""The FA4 backend without FA4: what it hands to the library and to Triton, and what it makes of their results.

The library's call is replaced by its twin in plain torch, Triton by the reference executor. On a GPU both are real.
T rows, K keys, Hq query heads, D head dim; S slots of 128 rows, M = 128 S, N packed keys, L places of a list.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import empty_state, fa4_backend, merge
from sglang_mm.kernels.problem import Problem, problem_of
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Phases, Selection
from sglang_mm.types import INF, Axis, TileProgram
from tests.exactness.layers import SCALE, Layer, one_rank, single
from tests.exactness.oracle import allowed, assert_exact, errors, exact, largest
from tests.exactness.tables import Item, tile_program
from tests.kernels.fa4_twin import Twin, assert_divided, by_head, run
from tests.token_maps import Prompt

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
BF16 = torch.bfloat16


@pytest.fixture
def twin(monkeypatch) -> Twin:
    return Twin(monkeypatch)


CAUSAL = (0, INF, 0, INF)
KEY_TILES = [range(128), range(128, 256), range(256, 300), range(300, 428), range(428, 556), [5, 9]]
"""Tiles 2 and 5 are short."""
BY_HAND = tile_program(
    torch.arange(600, 900), torch.arange(556),
    [range(128), range(128, 250), range(250, 300), [3, 299]],
    KEY_TILES,
    [
        Item(1, 1, full=[(3, 2), (0, 1)]),  # not in the order of tiles
        Item(0, 0, full=[(0, 5)], part=[(5, 1, CAUSAL, [1])]),  # a run across a short tile
        Item(0, 1, full=[(2, 1), (5, 1)]),  # short tiles alone
        Item(0, 2, full=[(1, 1), (3, 1)]),
        Item(2, 3, full=[(1, 4)], part=[(0, 1, (500, INF, 3, 9), None)]),  # rows of other tiles, for this unit
        Item(2, 1),
        Item(1, 2, part=[(0, 2, CAUSAL, None)]),
    ],
    heads=((4, 5), (0,), (2, 3)), group=2,
)  # fmt: skip
"""Three units, of which two are whole groups; head 1 has no unit. The last row tile shares rows with others."""


def compiled() -> Layer:
    """1070 tokens: text, a video of six frames, text. A unit of two heads, and four of one."""
    tokens = Prompt().text(150).video(6, 10, 12).text(200).token_map()
    columns = Lines(torch.arange(0, 1000, 3), torch.tensor([2]))
    phases = Phases(Axis.FRAME, torch.arange(0, 120, 2), torch.tensor([[0, 3], [0, 7]]))
    blocks = BlockSet(torch.arange(9), torch.arange(10).cumsum(0), torch.cat([torch.arange(n) for n in range(1, 10)]))
    units = (
        single(Dense(), heads=(0, 1)),
        single(AShape(130, 300), heads=(2,)),
        single(VerticalSlash(sink=0, window=100), columns, heads=(3,)),
        single(Grid(slash=2, sink=4, window=40, horizontal=True), phases, heads=(4,)),
        single(Blocks(), blocks, heads=(5,)),
    )
    halves = torch.cat([torch.arange(260), torch.arange(700, 1070)]), torch.arange(260, 700)
    return Layer(tokens, Selection(units, 2), halves, halves)


TRI = one_rank(Prompt().text(700).token_map(), single(TriShape(200, 150, 90), heads=(0, 1, 2, 3)), group=4)
LAYERS = {"compiled": compiled(), "tri_shape": TRI}


def test_a_program_by_hand_is_divided(twin):
    assert assert_divided(BY_HAND, 6, twin) == 2 * 128 * 4 * 128 + 2 * 50 * 2 * 128 + 122 * 3 * 128 + 2 * 2 * 3 * 128
    assert [shape[2:] for shape in twin.calls] == [(2, 4)]


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_programs_are_divided(name, twin):
    layer = LAYERS[name]
    heads = sum(len(unit.heads) for unit in layer.selection.units)
    listed = sum(assert_divided(program, heads, twin) for _, _, program in layer.programs)
    assert listed > 0.3 * int(layer.seen_by_head().sum())


@pytest.mark.parametrize("name", LAYERS)
def test_values(name, twin):
    """merges: of each program, one for each of FA4's calls that a row is in, which is one, and one for Triton."""
    layer = LAYERS[name]
    qkv = layer.random_qkv(torch.float32)
    assert_exact(attend_layer(layer, *qkv), *qkv, layer.seen_by_head(), merges=2 * layer.merges)
    assert twin.calls and twin.rests


def attend_layer(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """On the device of q."""
    state = empty_state(q)
    for rows, keys, program in layer.programs:
        mine = state[0][rows], state[1][:, rows]
        fa4_backend.attend(q[rows], k[keys], v[keys], moved(program, q.device), SCALE, *mine)
        state[0][rows], state[1][:, rows] = mine
    return state


def moved(program: TileProgram, device: torch.device) -> TileProgram:
    tables = {name: table.to(device) for name, table in vars(program).items() if isinstance(table, Tensor)}
    return replace(program, **tables)


def test_values_by_hand_with_a_state_of_other_keys(twin):
    """Rows and heads without keys keep their state."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(size, heads, 16, generator=generator) for size, heads in ((300, 6), (556, 3), (556, 3)))
    state = torch.randn(300, 6, 16, generator=generator), torch.randn(6, 300, generator=generator)
    unseen = ~by_head(BY_HAND, 6).bool().any(-1)
    before = state[0].transpose(0, 1)[unseen], state[1][unseen]
    expected = [each.double() for each in state]
    merge(*expected, *attend_tiles(q.double(), k.double(), v.double(), BY_HAND, scale=SCALE))
    fa4_backend.attend(q, k, v, BY_HAND, SCALE, *state)
    assert unseen[1].all() and torch.equal(state[0].transpose(0, 1)[unseen], before[0])
    assert torch.equal(state[1][unseen], before[1])
    # A score is a sum of 16 products, each off by 2^-24 of itself, as is each sum. All log-sum-exps are off by no more,
    # weights by twice that, and each of two merges rounds the largest value twice.
    off = 32 * 2**-24 * SCALE * largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    assert largest(state[1] - expected[1]) <= off + 4 * 2**-24 * largest(expected[1])
    assert largest(state[0] - expected[0]) <= (2 * off + 4 * 2**-24) * max(largest(v), largest(expected[0]))


def test_rounded_partial_results_end_close_to_one_rounded_pass(twin):
    """FA4 writes 16 bits. Error of out, rms, over that of the exact result rounded to bfloat16 once: at most 1.5."""
    layer = compiled()
    q, k, v = layer.random_qkv(BF16)
    want = exact(q, k, v, layer.seen_by_head())[0]
    error = (attend_layer(layer, q, k, v)[0].double() - want).square().mean().sqrt()
    assert 0 < error <= 1.5 * (want.to(BF16).double() - want).square().mean().sqrt()


@pytest.mark.parametrize(("pairs", "listed"), [(1 << 19, 24), (1024, 1 << 23), (1, 1)])
def test_long_lists_and_many_rows_are_taken_in_several_calls(pairs, listed, twin, monkeypatch):
    heads, program = 4, TRI.programs[0][2]
    together = fa4_backend.make_plan(program, heads).calls
    monkeypatch.setattr(fa4_backend, "PAIRS", pairs)
    monkeypatch.setattr(fa4_backend, "LISTED", listed)
    assert_divided(program, heads, twin)
    slots, longest = [shape[2] for shape in twin.calls], [shape[3] for shape in twin.calls]
    assert len(together) == 1 and sum(slots) == together[0].last and len(slots) > 1
    assert longest == sorted(longest, reverse=True) and longest[-1] < longest[0], "the heaviest first"
    for some, length in zip(slots, longest):
        assert some == 1 or (some * 128 * heads <= pairs and some * heads * length <= listed)


def test_without_full_entries_the_library_is_not_called(twin):
    few = replace(BY_HAND, full_ptr=torch.zeros_like(BY_HAND.full_ptr))
    few = replace(few, full_tile=BY_HAND.full_tile[:0], full_count=BY_HAND.full_count[:0])
    assert_divided(few, 6, twin)
    cut = replace(TRI, key_tile=64).programs[0][2]
    assert_divided(cut, 4, twin)
    assert not twin.calls


def test_nothing_to_attend(twin):
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = run(tile_program(none, none, [], [], []), *torch.zeros(3, 0, 1, 8))
    assert out.shape == (0, 1, 8) and lse.shape == (1, 0)


def test_tiles_of_too_many_rows_are_refused(twin):
    program = tile_program(torch.arange(130), torch.arange(128), [range(130)], [range(128)], [Item(0, 0, [(0, 1)])])
    with pytest.raises(ConfigError, match=r"a tile of 130 rows.*at most 128"):
        run(program, torch.zeros(130, 1, 8), *torch.zeros(2, 128, 1, 8))


LISTS, ROWS = fa4_backend.block_lists, fa4_backend.slot_rows


def drop_an_entry(plan, call):
    count, index = LISTS(plan, call)
    count.view(-1)[count.argmax()] -= 1
    return count, index


def shift_the_rows(plan, call):
    row, is_row = ROWS(plan, call)
    return row.roll(1, 1), is_row


@pytest.mark.parametrize(("name", "fault"), [("block_lists", drop_an_entry), ("slot_rows", shift_the_rows)])
def test_faults_are_noticed(name, fault, twin, monkeypatch):
    monkeypatch.setattr(fa4_backend, name, fault)
    layer = LAYERS["compiled"]
    with pytest.raises(AssertionError):
        assert_divided(layer.programs[0][2], 6, twin)
    qkv = layer.random_qkv(torch.float32)
    twin.takes_rest = True
    with pytest.raises(AssertionError, match="error"):
        assert_exact(attend_layer(layer, *qkv), *qkv, layer.seen_by_head(), merges=2 * layer.merges)


def test_lists_that_do_not_ascend_are_noticed(twin, monkeypatch):
    def as_they_come(program):
        tile = program.full_tile.long()
        return tile, tile + program.full_count

    monkeypatch.setattr(fa4_backend, "ascending_entries", as_they_come)
    with pytest.raises(AssertionError, match="not ascending"):
        assert_divided(BY_HAND, 6, twin)


HOPPER = Problem(torch.device("cuda"), 90, BF16, 28, 4, 128, rows=1024, keys=1024, items=8, entries=8)


@pytest.fixture(autouse=True)
def nothing_known_of_the_library():
    """What was found out about it is kept for good."""
    fa4_backend._import_failure.cache_clear()
    yield
    fa4_backend._import_failure.cache_clear()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": torch.device("cpu"), "capability": 0}, "needs sm_90, not cpu"),
        ({"capability": 75}, "needs sm_90, not sm_75"),
        ({"capability": 80}, "needs sm_90, not sm_80: .*silently ignores"),
        ({"capability": 89}, "needs sm_90, not sm_89: .*silently ignores"),
        ({"capability": 100}, "needs sm_90, not sm_100: .*lists for 256 rows"),
        ({"capability": 103}, "needs sm_90, not sm_103: .*lists for 256 rows"),
        ({"capability": 120}, "needs sm_90, not sm_120: .*no block lists"),
        ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
        ({"head_dim": 192}, "takes head dims .* up to 128, not 192"),
        ({"head_dim": 100}, "takes head dims that are multiples of 8 .*, not 100"),
    ],
)
def test_what_it_cannot_run(change, why, monkeypatch):
    monkeypatch.setattr(fa4_backend, "_library", lambda: None)
    assert fa4_backend.unfit(HOPPER) is None
    assert re.match(why, fa4_backend.unfit(replace(HOPPER, **change)))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError("No module", name="flash_attn.cute"), "needs flash-attn-4, which is not installed"),
        (ModuleNotFoundError("No module", name="cutlass"), "needs cutlass, which flash-attn-4 imports"),
        (ImportError("libcuda.so.1\nmore"), "needs flash-attn-4, whose import fails: libcuda.so.1$"),
        (RuntimeError("no driver"), "needs flash-attn-4, whose import fails: no driver"),
    ],
)
def test_a_library_that_cannot_be_imported_is_a_reason(error, why, monkeypatch):
    def broken():
        raise error

    monkeypatch.setattr(fa4_backend, "_library", broken)
    assert re.match(why, fa4_backend.unfit(HOPPER))


def test_a_library_told_to_serve_another_gpu_is_a_reason(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_80")
    assert re.search("another GPU.*sm_80", fa4_backend.unfit(HOPPER))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu(name, dim):
    """FA4 and Triton themselves, against one pass of PyTorch's own attention over the whole mask: at most 1.5 times
    its error of out, rms. The log-sum-exp is fp32; its exponentials are the GPU's, good to 2^-22 each."""
    layer, generator = LAYERS[name], torch.Generator().manual_seed(0)
    seen = layer.seen_by_head().cuda()
    tokens, heads = seen.shape[1], len(seen)
    sizes = heads, heads // layer.selection.group, heads // layer.selection.group
    q, k, v = (torch.randn(tokens, size, dim, generator=generator).to("cuda", BF16) for size in sizes)
    q *= dim**-0.5 / SCALE  # scores of standard deviation 1
    why = fa4_backend.unfit(problem_of(q, k, layer.programs[0][2]))
    if why:
        pytest.skip(f"FA4 {why}")
    actual, expected = attend_layer(layer, q, k, v), exact(q, k, v, seen)
    q_HTD, k_HKD, v_HKD = (each.transpose(0, 1)[None] for each in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q_HTD, k_HKD, v_HKD, attn_mask=seen[None], scale=SCALE, enable_gqa=True
    )[0].transpose(0, 1)
    of_one_pass = (dense.double() - expected[0]).square().mean().sqrt()
    assert (actual[0].double() - expected[0]).square().mean().sqrt() <= 1.5 * of_one_pass
    limit = allowed(expected, q, k, v, seen, torch.float32, merges=2 * layer.merges)[1]
    assert errors(actual, expected)[1] <= limit + 2**-21
