"""The digest that ranks compare tells any two selections apart; block lists, which ranks hold in part, are left out.

What is no set, or no set of this prompt, is refused.
"""

from itertools import combinations

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Marks, Nothing, Panel, Phases, Selection, Unit, read_marks
from sglang_mm.types import Axis, Modality
from tests.token_maps import uniform_video


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def selection(chosen=None, pattern=None, rows=None, keys=None, heads=(0,), more=(), group=2) -> Selection:
    panel = Panel(rows, keys, pattern or Dense(), chosen or Nothing())
    return Selection((Unit(heads, (panel, *more)),), group)


def shifts(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def test_digest_changes_with_every_field():
    panel = Panel(None, None, Dense(), Nothing())
    lines, grid = VerticalSlash(), Grid()
    all_different = [
        selection(),
        selection(heads=(1,)),
        selection(heads=(0, 1)),
        selection(rows=Modality.TEXT),
        selection(rows=Modality.VIDEO),
        selection(keys=Modality.TEXT),
        selection(more=(panel,)),
        Selection((*selection().units, *selection().units), 2),
        Selection((), 2),
        selection(group=1),
        selection(pattern=AShape()),
        selection(pattern=AShape(window=7)),
        selection(Lines(long(1, 2), long()), lines),
        selection(Lines(long(1), long(2)), lines),
        selection(Lines(long(), long(1, 2)), lines),
        selection(Lines(long(1, 3), long()), lines),
        selection(Lines(long(1, 2), long()), VerticalSlash(vertical=3)),
        selection(Phases(Axis.FRAME, long(1, 2), shifts()), grid),
        selection(Phases(Axis.ROW, long(1, 2), shifts()), grid),
        selection(Phases(Axis.FRAME, long(1), shifts()), grid),
        selection(Phases(Axis.FRAME, long(), shifts((1, 2))), grid),
        selection(Phases(Axis.FRAME, long(), shifts((2, 1))), grid),
        selection(Phases(Axis.FRAME, long(1), shifts((1, 2))), grid),
    ]
    assert all(left.digest() != right.digest() for left, right in combinations(all_different, 2))


def test_digest_does_not_read_block_lists():
    one, other = (
        selection(BlockSet(long(0, 1), long(0, 1, 3), long(0, 0, 1)), Blocks()),
        selection(BlockSet(long(4), long(0, 2), long(0, 4)), Blocks()),
    )
    assert one.digest() == other.digest() != selection(other.units[0].panels[0].chosen, Blocks(0.5)).digest()


def test_digest_is_the_same_for_equal_selections():
    assert selection(Lines(long(1), long(2)), VerticalSlash()).digest() == (
        selection(Lines(long(1), long(2)), VerticalSlash()).digest()
    )


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: Lines(long(1, 1), long()), r"columns \[1, 1\]"),
        (lambda: Lines(long(2, 1), long()), r"columns \[2, 1\]"),
        (lambda: Lines(long(), long(-1, 0)), r"diagonals \[-1, 0\]"),
        (lambda: Lines(torch.ones(2), long()), r"columns torch.float32 \(2,\)"),
        (lambda: Phases(Axis.ROW, long(3, 3), shifts()), r"classes \[3, 3\]"),
        (lambda: Phases(Axis.ROW, long(), shifts((0, 1), (0, 1))), "shifts"),
        (lambda: Phases(Axis.ROW, long(), long(0, 1)), r"shifts \(2,\)"),
        (lambda: BlockSet(long(1, 0), long(0, 1, 2), long(0, 0)), r"row_blocks \[1, 0\]"),
        (lambda: BlockSet(long(0), long(0, 1), long(0, 0)), "2 pointers for 1 row blocks, 2 key blocks"),
        (lambda: Panel(None, None, Grid(), Nothing()), "Nothing for Grid"),
    ],
)
def test_sets_that_are_no_sets(make, given):
    with pytest.raises(ConfigError, match=given):
        make()


@pytest.mark.parametrize(
    ("chosen", "given"),
    [
        (Lines(long(3, 74), long()), "column 74"),
        (Phases(Axis.FRAME, long(24), shifts()), "class 24"),
        (Phases(Axis.ROW, long(), shifts((1, 0))), "shift 0 in name space 1"),
        (Phases(Axis.ROW, long(), shifts((0, 6))), "shift 6 in name space 0"),
    ],
)
def test_sets_of_another_prompt(chosen, given):
    tokens = uniform_video(1, 4, 6)
    assert len(tokens) == 74
    with pytest.raises(ConfigError, match=given):
        read_marks([Lines(long(3), long()), chosen], tokens)


def test_marks_are_those_of_each_set():
    tokens = uniform_video(1, 4, 6)
    sets = (
        Nothing(),
        Phases(Axis.ROW, long(1, 5), shifts((0, 5))),
        Lines(long(73), long()),
        Phases(Axis.FRAME, long(), shifts()),
        BlockSet(long(), long(0), long()),
        Phases(Axis.FRAME, long(23), shifts((0, 0), (0, 7))),
    )
    none = Marks((), ())
    marks = [none, Marks((1, 5), ((0, 5),)), none, none, none, Marks((23,), ((0, 0), (0, 7)))]
    assert read_marks(sets, tokens) == marks
    assert read_marks([Nothing(), Lines(long(), long(3))], tokens) == [none, none]


def grouped(*heads: tuple[int, ...]) -> Selection:
    """2 query heads per K/V head; each unit has a set of its own."""
    units = (Unit(each, (Panel(None, None, VerticalSlash(), Lines(long(each[0]), long())),)) for each in heads)
    return Selection(tuple(units), 2)


def test_units_of_some_kv_heads():
    whole = grouped((0, 1), (2,), (3,), (4, 5), (7, 6))
    part = whole.of_kv_heads(1, 3)
    assert part.group == 2 and [unit.heads for unit in part.units] == [(0,), (1,), (2, 3)]
    assert [unit.panels for unit in part.units] == [unit.panels for unit in whole.units[1:4]]
    assert whole.of_kv_heads(3, 4).units[0].heads == (1, 0)
    assert whole.of_kv_heads(0, 4).digest() == whole.digest()


@pytest.mark.parametrize("heads", [(1, 1), (0, 3), (2, 3), (-1, 1)])
def test_kv_heads_that_a_selection_does_not_have(heads):
    with pytest.raises(ConfigError, match=rf"K/V heads {heads[0]} .. {heads[1] - 1}\. Allowed: some of \[0, 1\]"):
        grouped((0, 1), (2, 3)).of_kv_heads(*heads)


def test_dense_is_dense_everywhere():
    dense = Panel(Modality.TEXT, None, Dense(), Nothing())
    assert selection(more=(dense,)).is_dense
    assert not selection(more=(Panel(Modality.TEXT, None, AShape(), Nothing()),)).is_dense


def test_dense_units_apart():
    some = grouped((0, 1), (3,), (4, 5))
    dense = [Unit(heads, (Panel(None, None, Dense(), Nothing()),)) for heads in ((6, 7), (2,))]
    heads, others = Selection((dense[0], *some.units, dense[1]), 2).split_dense()
    assert heads == (2, 6, 7) and others.units == some.units and others.group == 2
    assert Selection(tuple(dense), 2).split_dense() == ((2, 6, 7), None)
    heads, others = some.split_dense()
    assert heads == () and others.units == some.units
    half = Unit((0,), (*dense[0].panels, Panel(Modality.TEXT, None, AShape(), Nothing())))
    assert Selection((half,), 1).split_dense()[0] == ()
