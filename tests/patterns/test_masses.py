"""Masses per key, distance and class difference against the whole table of probabilities.

And no such table is made, nor any other that is larger than what the choice is about.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_mm.kernels.probe import SCORES
from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.lines import choose_lines
from sglang_mm.patterns.select.masses import FIXED_POINT, Want, fixed, measure_masses
from sglang_mm.patterns.select.pooled import choose_blocks
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import by_difference, by_distance, hold, probabilities
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(30), Media(4, 3, 5, newline=True), Text(5), Media(9, 4, 6, before=2), Text(20))
UNITS = [(0, 1), (2,), (5,)]


def random(tokens=TOKENS, heads=6, group=3, dim=8, dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    q, k = (2 * torch.randn(len(tokens), n, dim, generator=draw, dtype=torch.float64) for n in (heads, heads // group))
    return q.to(dtype), k.to(dtype)


def measure(modality, wants, q, k, rows, keys, peers):
    held = Held(q, k, rows, keys, 0.5, peers, range(len(TOKENS)))
    probe = take_probe(held, modality, UNITS)
    return measure_masses(held, probe, UNITS, wants)


@pytest.mark.parametrize("modality", [None, Modality.TEXT, Modality.VIDEO])
@pytest.mark.parametrize("scores_at_once", [1 << 20, 6000])
def test_columns_and_distances_are_the_tables_sums(modality, scores_at_once, monkeypatch):
    monkeypatch.setitem(SCORES, "cpu", scores_at_once)
    q, k = random()
    held = hold(q, k, TOKENS, 0.5)
    probe = take_probe(held, modality, UNITS)
    masses = measure_masses(held, probe, UNITS, [])
    p_HRS = probabilities(q, k, probe.rows, 0.5)
    lower_S = torch.div(probe.rows.start - torch.arange(len(TOKENS)), 64, rounding_mode="floor")
    for unit, heads in enumerate(UNITS):
        p_RS = p_HRS[list(heads)].sum(0)
        torch.testing.assert_close(masses.columns[unit], p_RS.sum(0), rtol=0, atol=1e-12)
        early, late = masses.early[unit], masses.columns[unit] - masses.early[unit]
        bins = torch.zeros(8, dtype=torch.float64).index_add(0, lower_S.clamp(min=0), early)
        bins.index_add_(0, (lower_S + 1).clamp(min=0), late)  # keys after the rows have no mass
        torch.testing.assert_close(bins, by_distance(p_RS, probe.rows, 8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", ["frame", "row", "auto"])
def test_class_differences_are_the_tables_sums_and_sums_over_ranks(axis):
    q, k = random()
    rows = random_shards(len(TOKENS), 3)
    near = Want(0, None, Grid(axis=axis, slash=1, sink=0, window=1))
    far = Want(2, Modality.VIDEO, Grid(axis=axis, slash=2, sink=130, window=40))
    parts = spread(partial(measure, Modality.VIDEO, [near, far]), q, k, TOKENS, rows)
    axes = list(Axis) if axis == "auto" else [Axis(axis)]
    assert set(parts[0].shifts) == {(want, each) for want in (near, far) for each in axes}
    rows = parts[0].probe.rows
    p_HRS = probabilities(q, k, rows, 0.5)
    for want in (near, far):
        for each in axes:
            total = sum(part.shifts[want, each] for part in parts).double() / FIXED_POINT
            p_RS = p_HRS[list(UNITS[want.unit])].sum(0)
            grid = want.pattern
            expected = by_difference(p_RS, rows, TOKENS, TOKENS.classes(each), grid.sink, grid.window)
            assert expected.sum() > 0.1
            torch.testing.assert_close(total, expected, rtol=0, atol=64 * 400 / FIXED_POINT)


PICTURES = token_map(Text(9), Media(1, 5, 7), Media(3, 4, 6), Media(1, 3, 5), Text(4), Media(1, 2, 8, newline=True))


@pytest.mark.parametrize("scores_at_once", [1 << 20, 6 * 64 * 10])
@pytest.mark.parametrize("sink, window", [(0, 1), (20, 1), (0, 33), (95, 12)])
def test_class_differences_of_rows_of_several_items(sink, window, scores_at_once, monkeypatch):
    """Rows of a video, a picture, text and a picture with newlines; none of the first picture, nor of its size."""
    monkeypatch.setitem(SCORES, "cpu", scores_at_once)
    q, k = random(PICTURES)
    held = hold(q, k, PICTURES, 0.5)
    probe = take_probe(held, None, UNITS)
    items = PICTURES.item[probe.rows.start : probe.rows.stop].unique().tolist()
    assert items == [-1, 1, 2, 3]
    wants = [Want(unit, None, Grid(slash=1, sink=sink, window=window)) for unit in range(3)]
    shifts = measure_masses(held, probe, UNITS, wants).shifts
    p_HRS = probabilities(q, k, probe.rows, 0.5)
    for want in wants:
        p_RS = p_HRS[list(UNITS[want.unit])].sum(0)
        for axis in Axis:
            expected = by_difference(p_RS, probe.rows, PICTURES, PICTURES.classes(axis), sink, window)
            assert expected.sum() > 0.01
            total = shifts[want, axis].double() / FIXED_POINT
            torch.testing.assert_close(total, expected, rtol=0, atol=64 * 100 / FIXED_POINT)


class _Scattered(TorchDispatchMode):
    """How many numbers were added one by one to sums of masses."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.scatter_add_.default:
            self.elements += args[3].numel()
        return function(*args, **(kwargs or {}))


def test_each_pair_is_added_once_for_both_axes_and_all_grids_that_count_alike():
    q, k = random()
    held = hold(q, k, TOKENS, 0.5)
    probe = take_probe(held, Modality.VIDEO, UNITS)
    wants = [Want(0, keys, Grid(slash=slash)) for keys in (None, Modality.VIDEO) for slash in (1, 2, 3)]
    with _Scattered() as scattered:
        shifts = measure_masses(held, probe, UNITS, wants).shifts
    turned = 2 * len(probe.rows) * 24  # per axis and row its item's classes, once
    assert len(shifts) == 12 and scattered.elements <= len(probe.rows) * len(TOKENS) + turned


def test_rows_of_text_have_no_class_differences():
    q, k = random()
    held = hold(q, k, TOKENS, 0.5)
    probe = take_probe(held, Modality.TEXT, UNITS)
    assert measure_masses(held, probe, UNITS, [Want(0, None, Grid(slash=3))]).shifts == {}


def test_fixed_point_sums_are_exact_in_any_order():
    draw = torch.Generator().manual_seed(0)
    mass = torch.rand(10_000, generator=draw)
    numbers = fixed(mass)
    assert int(numbers.sum()) == int(numbers.flip(0).sum()) == sum(numbers.tolist())
    assert float((numbers.double() / FIXED_POINT - mass.double()).abs().max()) <= 0.5 / FIXED_POINT


class _Largest(TorchDispatchMode):
    """The most elements that any tensor had, and the most bytes."""

    elements, bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


def test_no_table_of_rows_and_keys_is_made():
    """16 heads, 64 rows, 8K keys: the table would have 8.4 million entries."""
    tokens = token_map(Text(64), Media(32, 16, 16))
    q, k = torch.zeros(len(tokens), 16, 4), torch.zeros(len(tokens), 4, 4)
    held = hold(q, k, tokens)
    units = [(head,) for head in range(16)]
    with _Largest() as largest:
        probe = take_probe(held, Modality.VIDEO, units)
        measure_masses(held, probe, units, [Want(0, None, Grid(slash=1))])
    assert largest.elements <= SCORES["cpu"] < 16 * 64 * len(tokens) / 4


@pytest.mark.parametrize("ranks", [1, 3])
def test_more_columns_than_keys_are_no_more_work_than_all_of_them(ranks):
    q, k = random(dim=4)
    wants = [Want(0, None, VerticalSlash(vertical=vertical, slash=0, sink=0, window=1)) for vertical in (10**6, 5)]

    def columns(q, k, rows, keys, peers):
        held = Held(q, k, rows, keys, 0.5, peers, range(len(TOKENS)))
        masses = measure_masses(held, take_probe(held, None, UNITS), UNITS, wants)
        with _Largest() as largest:
            lines = choose_lines(held, masses, wants)
        return [each.columns.tolist() for each in lines], largest.elements

    for (every, five), elements in spread(columns, q, k, TOKENS, random_shards(len(TOKENS), ranks)):
        assert every == list(range(len(TOKENS) - 1)) and len(five) == 5
        assert elements < 10_000


def test_lists_of_all_blocks_are_never_in_one_table():
    """128 x 129 / 2 blocks for each of eight choices: at most one choice's list is made at a time."""
    tokens = token_map(Text(128 * 128))
    q, k = torch.zeros(len(tokens), 1, 1), torch.zeros(len(tokens), 1, 1)
    held = hold(q, k, tokens)
    probe = take_probe(held, None, [(0,)])
    wants = [Want(0, None, Blocks(1 - number / 1000)) for number in range(8)]
    with pytest.MonkeyPatch.context() as patch, _Largest() as largest:
        patch.setitem(SCORES, "cpu", 1 << 10)
        blocks = choose_blocks(held, probe, [(0,)], wants)
    assert len(blocks[0].key_blocks) == 128 * 129 // 2
    kept = sum(len(each.key_blocks) for each in blocks)
    assert kept > 7 * 128 * 129 // 2 and largest.bytes < 8 * kept / 3


def test_control_the_largest_tensor_is_noticed():
    with _Largest() as largest:
        torch.zeros(3, 5).expand(7, 3, 5).clone()
    assert largest.elements == 105
