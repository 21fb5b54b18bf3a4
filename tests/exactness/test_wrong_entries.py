"""Entries simplified in ways that look right: each is applied here and seen to be wrong, and the real thing right.

Values are of order 1, and so are the errors.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from sglang_mm.patterns.catalog import VerticalSlash
from sglang_mm.patterns.chosen import Lines
from sglang_mm.patterns.program.shard import Seams, Shard
from sglang_mm.types import INF, TileProgram
from tests import token_maps
from tests.exactness.controls import assert_right, assert_wrong, changed
from tests.exactness.layers import Layer, attend_by, one_rank, single, times_shown_by
from tests.exactness.oracle import allowed, errors, exact

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
BOUNDS = ("low", "high", "k_low", "k_high")


def crossing(**how) -> Layer:
    """626 tokens: sink, window, columns, and block diagonals that some of the columns lie in."""
    tokens = token_maps.uniform_video(24, 4, 6)
    lines = Lines(torch.arange(11, len(tokens), 7), torch.tensor([1, 3]))
    return one_rank(tokens, single(VerticalSlash(sink=5, window=50), lines), **how)


def with_bounds(program: TileProgram, **values: int) -> TileProgram:
    bounds = program.bounds.clone()
    for name, value in values.items():
        bounds[:, BOUNDS.index(name)] = value
    return replace(program, bounds=bounds)


@pytest.mark.parametrize("key_tile", [64, 128])
@pytest.mark.parametrize(
    "open_side",
    [{"high": INF}, {"k_low": 0}, {"high": INF, "k_low": 0, "k_high": INF}],
    ids=["largest distance", "first key", "all but the smallest distance"],
)
def test_bounds_with_one_side(open_side, key_tile):
    layer = crossing(key_tile=key_tile)
    wrong = changed(layer, lambda program: with_bounds(program, **open_side))
    assert_wrong(layer, wrong, off_by=0.1, twice=True)


def test_lines_that_do_not_know_of_blocks():
    layer = crossing()
    assert all(len(program.live) for _, _, program in layer.programs)
    wrong = changed(layer, lambda program: replace(program, part_live=torch.full_like(program.part_live, -1)))
    assert_wrong(layer, wrong, off_by=0.1, twice=True)


def test_raw_tiles_across_borders_of_blocks(monkeypatch):
    """Such a tile takes the diagonals of its first row, so that the mask is one of tiles and not of positions."""
    sizes = (96, 128), (128, 96), (100, 100)
    layers = [crossing(row_tile=rows, key_tile=keys) for rows, keys in sizes]
    for layer in layers:
        assert_right(layer)
    pick = Shard.pick
    monkeypatch.setattr(Shard, "pick", lambda self, members, tile, _=Seams.NONE: pick(self, members, tile))
    wrong = [replace(layer).programs for layer in layers]
    shown = [times_shown_by(programs) for programs in wrong]
    for one, other in combinations(shown, 2):
        assert not torch.equal(one, other)
    qkv = layers[0].random_qkv()
    expected = exact(*qkv, layers[0].seen_by_head())
    for programs in wrong:
        assert errors(attend_by(programs, *qkv), expected)[0] > 0.1


def without_entry(program: TileProgram, table: str, number: int) -> TileProgram:
    """table: full or part."""
    ptr = getattr(program, f"{table}_ptr").clone()
    ptr[ptr > number] -= 1
    names = ("tile", "count") if table == "full" else ("tile", "count", "bounds", "live")
    columns = {f"{table}_{name}": getattr(program, f"{table}_{name}") for name in names}
    kept = {name: torch.cat([column[:number], column[number + 1 :]]) for name, column in columns.items()}
    return replace(program, **{f"{table}_ptr": ptr}, **kept)


@pytest.mark.parametrize("table", ["full", "part"])
def test_one_entry_left_out(table):
    """Whichever it is: its keys are missing, and rows are off. Few entries show nothing, and are not missed."""
    layer = crossing(key_tile=32)
    assert_right(layer)
    ((_, _, program),) = layer.programs
    qkv, seen_HSS = layer.random_qkv(), layer.seen_by_head()
    expected = exact(*qkv, seen_HSS)
    limit, _ = allowed(expected, *qkv, seen_HSS, torch.float64, layer.merges)
    missed = []
    for number in range(len(getattr(program, f"{table}_tile"))):
        wrong = changed(layer, lambda each, number=number: without_entry(each, table, number))
        missed.append(not torch.equal(times_shown_by(wrong), layer.masks.byte()))
        error = errors(attend_by(wrong, *qkv), expected)[0]
        assert error > 1e6 * limit if missed[-1] else error <= limit
    assert len(missed) > 10 and sum(missed) > 0.9 * len(missed)
