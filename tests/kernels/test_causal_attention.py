"""causal_attention against dense fp64 softmax: every backend, odd sizes, positions of every shape a layout makes."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention, cpu_flash, reference
from tests.kernels.oracle import assert_matches

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NAN = float("nan")


def spread(*spans: tuple[int, int] | tuple[int, int, int]) -> torch.Tensor:
    return torch.cat([torch.arange(*span) for span in spans])


POSITIONS = {
    "own piece": (spread((0, 150)), spread((0, 150))),
    "own piece with a jump": (spread((0, 61), (900, 977)), spread((0, 61), (900, 977))),
    "later queries": (spread((500, 533)), spread((0, 257))),
    "earlier queries": (spread((0, 33)), spread((100, 200))),
    "some rows see nothing": (spread((0, 80)), spread((40, 60))),
    "zigzag, other rank": (spread((0, 50), (150, 200)), spread((50, 150))),
    "stripes, other rank": (spread((1, 600, 4)), spread((3, 600, 4))),
    "sparse queries, dense keys": (spread((0, 1000, 97)), spread((0, 1000))),
    "dense queries, sparse keys": (spread((0, 400)), spread((7, 400, 97))),
    "one of each": (spread((5, 6)), spread((5, 6))),
    "no queries": (spread((0, 0)), spread((0, 9))),
    "no keys": (spread((0, 9)), spread((0, 0))),
    "neither": (spread((0, 0)), spread((0, 0))),
}
HEADS = {"MHA": (3, 3, 16), "GQA": (6, 2, 80), "MQA": (5, 1, 33)}


def draw(pos_q, pos_k, heads, dtype, seed=0):
    query_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(pos_q), query_heads), (len(pos_k), kv_heads), (len(pos_k), kv_heads)
    return [torch.randn(*size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.fixture(params=["real tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Small tiles reach every border with few rows."""
    if request.param == "small tiles":
        monkeypatch.setattr(cpu_flash, "TILE", 16)
        monkeypatch.setattr(cpu_flash, "PARTIAL_KEYS", 24)
        monkeypatch.setattr(reference, "SCORES", 5000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_backend_equals_dense(tiles, backend, positions, heads, dtype):
    q, k, v = draw(*positions, heads, dtype)
    state = causal_attention(q, k, v, *positions, scale=0.21, backend=backend)
    assert state[0].dtype == state[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(state, q, k, v, *positions, 0.21)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_tiles_of_real_size(backend):
    """Several tiles, cut at the jump between two zigzag pieces, next to keys of another rank."""
    mine, theirs = spread((0, 1500), (4500, 6000)), spread((1500, 4500))
    for keys in (mine, theirs):
        q, k, v = draw(mine, keys, (2, 1, 16), torch.float32)
        assert_matches(causal_attention(q, k, v, mine, keys, scale=0.3, backend=backend), q, k, v, mine, keys, 0.3)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_nan_around_and_behind_the_keys_is_never_read(backend):
    """Buffers larger than the tensors, and keys after the last query, hold NaN; heads come from a fused QKV."""
    pos_q, pos_k = spread((0, 70)), spread((0, 100))
    q, k, v = draw(pos_q, pos_k, HEADS["GQA"], torch.float32)
    k[70:], v[70:] = NAN, NAN
    views = []
    for tensor in (q, k, v):
        buffer = torch.full((len(tensor) + 9, tensor.shape[1] + 2, 90), NAN)
        views.append(buffer[4 : 4 + len(tensor), 1:-1, 5:85].copy_(tensor))
    state = causal_attention(*views, pos_q, pos_k, scale=0.2, backend=backend)
    assert_matches(state, q, k[:70], v[:70], pos_q, pos_k[:70], 0.2)


def test_memory_of_the_reference_does_not_grow_with_queries_times_keys(monkeypatch):
    held, attend_tile = [], reference._attend_tile

    def watch(q, k_HDT, v, seen):
        held.append(len(q) * q.shape[1] * k_HDT.shape[2])
        return attend_tile(q, k_HDT, v, seen)

    monkeypatch.setattr(reference, "SCORES", 10_000)
    monkeypatch.setattr(reference, "_attend_tile", watch)
    pos = torch.arange(900)
    causal_attention(*draw(pos, pos, HEADS["GQA"], torch.float32), pos, pos, scale=0.2, backend="reference")
    assert 0 < max(held) <= 10_000


def test_the_middle_part_of_a_flash_tile_stays_narrow():
    pos_q, pos_k = spread((0, 3000), (200_000, 203_000), (300_000, 800_000, 1000)), torch.arange(800_000)
    before, seen = torch.searchsorted(pos_k, pos_q), torch.searchsorted(pos_k, pos_q, right=True)
    tiles = list(cpu_flash._tiles(before, seen))
    assert [first for first, _ in tiles] == [0, *(last for _, last in tiles[:-1])] and tiles[-1][1] == len(pos_q)
    assert max(last - first for first, last in tiles) <= cpu_flash.TILE
    assert max(int(seen[last - 1] - before[first]) for first, last in tiles) <= cpu_flash.PARTIAL_KEYS


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(9, 2, 8)}, "Hq a multiple of Hkv"),
        ({"q": torch.zeros(5, 3, 8)}, "Hq a multiple of Hkv"),
        ({"q": torch.zeros(5, 4, 8).bfloat16()}, "one dtype on one device"),
        ({"pos_q": torch.arange(4)}, "give each row its position"),
        ({"pos_k": torch.arange(10, dtype=torch.int32)}, "give each row its position"),
        ({"pos_k": torch.arange(10).flip(0)}, "sort the rows"),
        ({"backend": "fast"}, "auto, reference, cpu_flash"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    tensors = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(10, 2, 8), "v": torch.zeros(10, 2, 8)}
    given = tensors | {"pos_q": torch.arange(5), "pos_k": torch.arange(10), "backend": "auto"} | change
    backend = given.pop("backend")
    with pytest.raises(ConfigError, match=message):
        causal_attention(*given.values(), scale=1.0, backend=backend)
