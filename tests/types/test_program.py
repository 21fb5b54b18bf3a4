"""TileProgram: what it counts, on tables written by hand."""

from dataclasses import replace

import torch

from sglang_mm.types import INF
from tests.exactness.tables import Item, tile_program

CAUSAL = (0, INF, 0, INF)
PROGRAM = tile_program(
    torch.arange(10, 14), torch.arange(12),
    rows=[[0, 1], [2, 3]],
    keys=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11]],
    items=[
        Item(0, 0, full=[(0, 2)], part=[(2, 2, CAUSAL, None)]),
        Item(0, 1, full=[(0, 1), (2, 1)], part=[(1, 1, CAUSAL, [0, 3]), (3, 1, CAUSAL, None)]),
        Item(1, 1),
    ],
    heads=((0,), (1,)),
)  # fmt: skip


def test_items_and_entries():
    assert PROGRAM.items == 3
    assert PROGRAM.entries == 6


def test_visits_count_every_tile_of_a_run():
    assert PROGRAM.visits == (2 + 2) + (1 + 1 + 1 + 1)


def test_bytes_of_all_tables():
    tokens = 8 * (4 + 12)  # positions
    tiles = 4 * (4 + 12) + 8 * (3 + 5)  # rows and keys, and where their tiles start
    items = 2 * 4 * 3 + 2 * 8 * 4
    entries = 2 * 4 * 3 + 4 * 4 * 3 + 4 * 4 * 3 + 16  # full, partial, bounds, bits
    assert PROGRAM.nbytes() == tokens + tiles + items + entries


def test_bytes_follow_the_element_size():
    wider = replace(PROGRAM, rows=PROGRAM.rows.long())
    assert wider.nbytes() == PROGRAM.nbytes() + 4 * 4


def test_no_position_reaches_infinity():
    assert torch.iinfo(torch.int32).max == INF
