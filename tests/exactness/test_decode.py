"""The decoder that other tests trust, on programs small enough to draw: times shown, rows down, keys to the right."""

import torch

from sglang_mm.types import INF
from tests.exactness.decode import times_shown
from tests.exactness.tables import Item, tile_program

ALL = (-INF, INF, -INF, INF)
POS_Q, POS_K = torch.tensor([2, 5, 9]), torch.tensor([0, 3, 5, 8, 9])
ROWS, KEYS = [[0, 1], [2]], [[0, 1], [2], [3, 4]]


def picture(*items: Item, rows=ROWS, keys=KEYS, heads=((0,),)) -> list[str]:
    shown = times_shown(tile_program(POS_Q, POS_K, rows, keys, items, heads))
    return [" ".join("".join(map(str, row)) for row in unit) for unit in shown.tolist()]


def test_nothing():
    assert picture() == ["00000 00000 00000"]
    assert picture(Item(0, 0)) == ["00000 00000 00000"]


def test_full_entries_show_whole_tiles():
    assert picture(Item(0, 0, full=[(0, 1)])) == ["11000 11000 00000"]
    assert picture(Item(0, 1, full=[(0, 2)])) == ["00000 00000 11100"]
    assert picture(Item(0, 0, full=[(2, 1)]), Item(0, 1, full=[(0, 3)])) == ["00011 00011 11111"]


def test_bounds():
    def with_bounds(*bounds: int) -> list[str]:
        return picture(Item(0, 0, part=[(0, 3, bounds, None)]), Item(0, 1, part=[(0, 3, bounds, None)]))

    assert with_bounds(*ALL) == ["11111 11111 11111"]
    assert with_bounds(0, INF, 0, INF) == ["10000 11100 11111"]
    assert with_bounds(1, INF, 0, INF) == ["10000 11000 11110"]
    assert with_bounds(0, 4, 0, INF) == ["10000 01100 00011"]
    assert with_bounds(0, INF, 3, 9) == ["00000 01100 01110"]
    assert with_bounds(0, 5, 3, 8) == ["00000 01100 00100"]


def test_bits():
    assert picture(Item(0, 0, part=[(2, 1, ALL, [1])])) == ["00001 00001 00000"]
    assert picture(Item(0, 0, part=[(0, 1, ALL, [0]), (2, 1, ALL, [])])) == ["10000 10000 00000"]
    assert picture(Item(0, 0, part=[(0, 1, (3, INF, 0, INF), [0, 1])])) == ["00000 10000 00000"]


def test_every_bit_of_a_tile():
    positions = torch.arange(128)
    for live in ([0], [63], [64], [127], [0, 62, 65, 126], list(range(128))):
        item = Item(0, 0, part=[(0, 1, ALL, live)])
        shown = times_shown(tile_program(positions[:1], positions, [[0]], [positions.tolist()], [item]))
        assert shown[0, 0].nonzero().flatten().tolist() == live


def test_what_comes_twice_is_counted_twice():
    assert picture(Item(0, 0, full=[(0, 1), (0, 2)])) == ["22100 22100 00000"]
    assert picture(Item(0, 0, full=[(0, 1)], part=[(0, 1, (0, INF, 0, INF), None)])) == ["21000 22000 00000"]
    assert picture(Item(0, 0, full=[(0, 1)]), keys=[[1, 1]]) == ["02000 02000 00000"]
    assert picture(Item(0, 0, full=[(1, 1)]), rows=[[2, 2]]) == ["00000 00000 00200"]


def test_units_apart():
    items = Item(0, 0, full=[(1, 1)]), Item(1, 0, full=[(2, 1)]), Item(1, 1, full=[(0, 1)])
    assert picture(*items, heads=((0,), (1,))) == ["00100 00100 00000", "00011 00011 11000"]
