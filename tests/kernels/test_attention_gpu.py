"""The attention kernel on a CUDA device: numbers against the reference, and that nothing waits for the device."""

import pytest
import torch

from sglang_mm.kernels import causal_attention, empty_state
from sglang_mm.kernels.causal import causal_program
from sglang_mm.kernels.tiles import attend_tiles, tile_lse
from sglang_mm.kernels.triton_backend import launch, works
from tests.exactness.layers import SCALE
from tests.exactness.oracle import largest
from tests.exactness.tables import Item, tile_program
from tests.kernels import oracle
from tests.kernels.test_causal_attention import POSITIONS
from tests.kernels.test_causal_attention import draw as draw_causal
from tests.kernels.test_tiles import KEYS, POS_K, POS_Q, ROWS, TWO_UNITS, draw

pytestmark = pytest.mark.gpu
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def on_device(program):
    tensors = {name: each.cuda() for name, each in vars(program).items() if isinstance(each, torch.Tensor)}
    return type(program)(**vars(program) | tensors)


@pytest.fixture(params=["whole items", "split items"])
def parts(request, monkeypatch):
    if request.param == "split items":
        monkeypatch.setattr(works, "SHORTEST", 1)


@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_values(dtype, dim, parts):
    """Weights are rounded to the dtype of v, by half an eps each; sums and exponentials are of fp32."""
    q, k, v = (each.cuda() for each in draw(3, 1, dtype, dim))
    program = on_device(TWO_UNITS)
    out, lse = empty_state(q)
    launch.attend(q, k, v, program, SCALE, out, lse)
    want, lse_want = attend_tiles(q.double(), k.double(), v.double(), program, scale=SCALE)
    score = SCALE * largest(q.double().norm(dim=-1)) * largest(k.double().norm(dim=-1))
    fp32 = 8 * 2.0**-23 * (1 + score)
    assert torch.equal(lse.isinf(), lse_want.isinf())
    assert largest((lse - lse_want)[lse_want.isfinite()]) <= fp32 * max(1, largest(lse_want))
    assert largest(out - want) <= (fp32 + EPS[dtype] / 2) * largest(v)
    alone = torch.full_like(lse, float("-inf"))
    launch.add_lse(q, k, program, SCALE, alone)
    assert largest((alone - tile_lse(q, k, program, scale=SCALE))[lse.isfinite()]) <= fp32 * max(1, largest(lse_want))


@pytest.mark.parametrize("positions", [each for each in POSITIONS.values() if all(map(len, each))])
def test_causal_attention(positions):
    q, k, v = (each.cuda() for each in draw_causal(*positions, (6, 2, 80), torch.float16))
    out, lse = causal_attention(q, k, v, *positions, scale=0.21, backend="triton")
    want = oracle.exact(q, k, v, *positions, 0.21)
    limits = oracle.tolerances(want, q, k, v, *positions, 0.21, torch.float32, merges=1)
    assert torch.equal(lse.isinf(), want[1].isinf())
    assert largest(out - want[0]) <= limits[0] + EPS[torch.float16] / 2 * largest(v)
    assert largest((lse - want[1])[want[1].isfinite()]) <= limits[1]


def test_nothing_waits_for_the_device():
    q, k, v = (each.cuda() for each in draw(3, 1, torch.float16, 64))
    program = on_device(tile_program(POS_Q, POS_K, ROWS, KEYS, [Item(0, 0, full=[(0, 2)])], ((0, 1, 2),), 3))
    state = empty_state(q)
    launch.attend(q, k, v, program, SCALE, *state)  # compiles, and copies what is copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch.attend(q, k, v, program, SCALE, *state)
        launch.add_lse(q, k, program, SCALE, state[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def many_tiles():
    """28 heads over 4 K/V heads, 1500 rows in two stretches, as a rank has them; q in order of heads."""
    positions = torch.cat([torch.arange(700), torch.arange(2200, 3000)]).cuda()
    draw_from = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 1500, 128, generator=draw_from).bfloat16().cuda() for heads in (28, 4, 4))
    return *(each.transpose(0, 1) for each in (q, k, v)), causal_program(positions, positions, 4, 7)


def test_many_tiles_in_bf16(many_tiles, parts):
    q, k, v, program = many_tiles
    out, lse = empty_state(q)
    launch.attend(q, k, v, program, 128**-0.5, out, lse)
    want, lse_want = attend_tiles(q.double(), k.double(), v.double(), program, scale=128**-0.5)
    assert largest(out - want) <= (2.0**-16 + EPS[torch.bfloat16] / 2) * largest(v)
    assert largest(lse - lse_want) <= 2.0**-19 * max(1, largest(lse_want))


def test_the_same_bits_every_time(many_tiles, parts):
    q, k, v, program = many_tiles
    states = [empty_state(q) for _ in range(3)]
    for state in states:
        launch.attend(q, k, v, program, 128**-0.5, *state)
    assert all(torch.equal(a, b) for state in states[1:] for a, b in zip(state, states[0]))


def test_in_a_cuda_graph_on_a_stream_of_its_own(many_tiles):
    q, k, v, program = many_tiles
    want, state = empty_state(q), empty_state(q)
    launch.attend(q, k, v, program, 128**-0.5, *want)  # compiles, and copies what is copied once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.attend(q, k, v, program, 128**-0.5, *state)
    state[0].zero_(), state[1].fill_(float("-inf"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, state, want))
