"""Programs for FlashInfer's backend, what its kernels are told about them, and how far off its results are.

T rows, K keys, Hq query heads.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sglang_mm.kernels.flashinfer_backend import attend
from sglang_mm.kernels.flashinfer_backend.plan import Numbers
from sglang_mm.kernels.flashinfer_backend.plan_cache import plan_of
from sglang_mm.kernels.merge import empty_state
from sglang_mm.types import INF, TileProgram
from tests.exactness.decode import times_shown
from tests.exactness.layers import SCALE
from tests.exactness.oracle import allowed, errors, exact, largest
from tests.exactness.tables import Item, tile_program
from tests.exactness.test_tile_sizes import every_pattern
from tests.kernels.flashinfer_twin import Paged
from tests.kernels.test_tiles import TWO_UNITS

CAUSAL = (0, INF, 0, INF)
ROWS, KEYS = torch.arange(100, 150), torch.arange(0, 150, 2)
ROW_TILES = [range(20), range(20, 27), range(27, 50)]
KEY_TILES = [range(32), range(32, 61), range(61, 75), range(3, 35)]
"""Tile 1 and tile 2 are ragged; tile 3 holds lines: keys that other tiles have too."""
HAND_WRITTEN = {
    "two units": TWO_UNITS,
    "groups of heads, ragged tiles": tile_program(
        ROWS, KEYS, ROW_TILES, KEY_TILES,
        [
            Item(0, 0, full=[(0, 3)]),
            Item(0, 1, full=[(1, 1)], part=[(2, 1, CAUSAL, None), (0, 1, (30, 90, 0, INF), None)]),
            Item(1, 2, full=[(0, 1), (2, 1)], part=[(1, 1, (0, 80, 70, 100), None)]),
            Item(2, 1),
            Item(2, 0, part=[(0, 3, CAUSAL, None)]),
        ],
        heads=((2, 3), (0,), (1,)), group=2,
    ),
    "one tile in several entries": tile_program(
        ROWS, KEYS, ROW_TILES, KEY_TILES,
        [
            Item(0, 0, full=[(1, 1)], part=[(0, 1, (0, 60, 0, INF), None), (0, 1, (90, INF, 0, INF), None)]),
            Item(0, 1, part=[(3, 1, CAUSAL, [0, 1, 7, 31]), (3, 1, CAUSAL, [2, 3, 30]), (3, 1, (0, 90, 70, 74), [29])]),
        ],
    ),
    "rows that see nothing": tile_program(
        ROWS, KEYS, ROW_TILES, KEY_TILES,
        [Item(0, 0, part=[(0, 2, (60, INF, 0, INF), None)]), Item(0, 1, part=[(0, 1, (0, 0, 0, INF), None)])],
    ),
    "no entries": tile_program(ROWS, KEYS, ROW_TILES, KEY_TILES, [Item(0, 0)]),
}  # fmt: skip


def compiled(**tiles) -> list[TileProgram]:
    """Eight units of one layer: every pattern, over the first rank's rows and another's keys, axis by axis."""
    layer = replace(every_pattern(), **tiles)
    return [program for *_, program in layer.programs_of(layer.rows[0], layer.keys[:2])]


def one_rank(dtype: torch.dtype, dim: int = 8):
    """q of the first of three ranks, k and v of the prompt, what is seen bool [Hq, T, S]; (keys, program) of pieces."""
    layer = every_pattern()
    heads = len(layer.selection.units)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(layer.tokens), count, dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, heads // layer.selection.group, heads // layer.selection.group)
    )
    programs = [(keys, program) for _, keys, program in layer.programs_of(layer.rows[0], layer.keys)]
    return q[layer.rows[0]], k, v, layer.seen_by_head()[:, layer.rows[0]], programs


def sizes_of(program: TileProgram) -> tuple[int, int]:
    """Query heads and K/V heads."""
    heads = 1 + max(head for unit in program.heads for head in unit)
    return -(-heads // program.group) * program.group, -(-heads // program.group)


def draw(program: TileProgram, dtype: torch.dtype, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = sizes_of(program)
    sizes = (len(program.pos_q), heads), *[(len(program.pos_k), kv_heads)] * 2
    return tuple(torch.randn(*size, dim, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def numbers_of(q: Tensor, k: Tensor) -> Numbers:
    return Numbers(q.device, q.dtype, k.shape[1], q.shape[2], SCALE)


def seen_by_head(program: TileProgram) -> Tensor:
    """bool [Hq, T, K] of the oracle."""
    shown = times_shown(program)
    seen = torch.zeros(sizes_of(program)[0], *shown.shape[1:], dtype=torch.bool)
    for unit, heads in enumerate(program.heads):
        seen[list(heads)] = shown[unit] == 1
    return seen


def attended(program: TileProgram, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = empty_state(q)
    attend(q, k, v, program, SCALE, *state)
    return state


def excess(program: TileProgram, dtype: torch.dtype, dim: int = 8) -> list[float]:
    """Errors of out and of lse as shares of what is allowed.

    A call rounds its weights and its result to 16 bits: each is off by u = eps / 2 of the largest value at most, and
    merging takes a weighted mean. To that comes what the same in fp32 may be off by; a conversion to natural logarithms
    rounds as a merge does.
    """
    q, k, v = draw(program, dtype, dim)
    state, seen = attended(program, q, k, v), seen_by_head(program)
    expected = exact(q, k, v, seen)
    merges = 2 * len(plan_of(program, numbers_of(q, k)).calls)
    limits = allowed(expected, q, k, v, seen, torch.float32, merges)
    limits[0] += 2.01 * torch.finfo(dtype).eps / 2 * largest(v)
    return [error / limit if error else 0.0 for error, limit in zip(errors(state, expected), limits)]


def decoded(program: TileProgram, ran: list[Paged]) -> Tensor:
    """uint8 [Hq, T, K]: how often the kernels were told to show a key to a row of a head, which is written back.

    Rows and keys are told by their values: number in the shard and head, which 16 bits hold exactly up to 2048.
    """
    heads, kv_heads = sizes_of(program)
    q, k = torch.zeros(len(program.pos_q), heads, 8), torch.zeros(len(program.pos_k), kv_heads, 8)
    for each in (q, k):
        each[..., 0], each[..., 1] = torch.arange(len(each))[:, None], torch.arange(each.shape[1])
    q, k = q.half(), k.half()
    attended(program, q, k, k)
    counts = torch.zeros(heads, len(q), len(k), dtype=torch.uint8)
    for call, paged in zip(plan_of(program, numbers_of(q, k)).calls, ran, strict=True):
        is_kept = torch.zeros(len(paged.q), dtype=torch.bool).index_fill_(0, call.kept, True)
        row_M, head_M = paged.q[:, 0, :2].long().unbind(1)
        key_N, kv_head_N = paged.k[:, 0, :2].long().unbind(1)
        for rows, keys, seen in paged.requests():
            assert bool((head_M[rows, None] // program.group == kv_head_N[keys])[is_kept[rows]].all())
            at = (seen & is_kept[rows, None]).nonzero()
            where = head_M[rows[at[:, 0]]], row_M[rows[at[:, 0]]], key_N[keys[at[:, 1]]]
            counts.index_put_(where, torch.ones_like(at[:, 0], dtype=torch.uint8), accumulate=True)
    return counts
