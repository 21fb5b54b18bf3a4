"""Operations of attention, counted one way throughout the suite.

A pair of a row and a key costs 4 D floating-point operations per query head: a product and a sum for each of D places,
in the scores and again in the values. Softmax is not counted.
"""

import torch

from sglang_mm.types import TileProgram


def attention_flops(pairs: int, head_dim: int) -> int:
    """pairs: of a query row and a key, over all query heads."""
    return 4 * pairs * head_dim


def dense_pairs(tokens: int, heads: int) -> int:
    """Causal pairs of a whole prompt: dense attention is charged for what it must compute, not for what it hides."""
    return heads * tokens * (tokens + 1) // 2


def visited_pairs(program: TileProgram) -> int:
    """Pairs of the tiles that entries visit, whole tiles with what their masks hide, but not the padding of tiles.

    Waits for the device.
    """
    heads = torch.tensor([len(unit) for unit in program.heads], device=program.rows.device)
    rows = program.row_ptr.diff()[program.item_rows.long()] * heads[program.item_unit.long()]
    seen = 0
    for ptr, tile, count in (
        (program.full_ptr, program.full_tile, program.full_count),
        (program.part_ptr, program.part_tile, program.part_count),
    ):
        keys = program.key_ptr[(tile + count).long()] - program.key_ptr[tile.long()]
        seen += int((rows.repeat_interleave(ptr.diff()) * keys).sum())
    return seen
