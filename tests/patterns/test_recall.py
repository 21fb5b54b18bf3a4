"""Recall is exact where sums of masses are not; the same on every rank; dense rows are measured as sparse ones."""

from functools import partial

import pytest
import torch

from sglang_mm.patterns.catalog import AShape, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Lines, Nothing, Panel, Phases, Unit
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.patterns.select.recall import measure_recall
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import by_distance, hold, probabilities, recall
from tests.patterns.planted import Columns, Diagonal, Line, Noise, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
VIDEO = token_map(Text(40), Media(40, 4, 6), Text(30))
NONE = torch.zeros(0, 2, dtype=torch.int64)


def unit(heads, pattern, chosen, rows=None):
    return Unit(heads, (Panel(rows, None, pattern, chosen),))


def measured(q, k, each, modality=None):
    held = hold(q, k, VIDEO)
    probe = take_probe(held, modality, [each.heads])
    (kept,) = measure_recall(held, probe, [each])
    return kept, recall(probabilities(q, k, probe.rows), probe.rows, each, VIDEO)


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_sums_of_masses_count_overlaps_twice_and_the_guard_does_not(dtype, allowed):
    """The heaviest columns lie on the heaviest diagonal: their mass is in both sums."""
    q, k = plant(VIDEO, [Diagonal(3)], logit=6.0, noise=1.0, dtype=dtype)
    rows = range(966, 1030)
    p_RS = probabilities(q, k, rows)[0]
    columns = p_RS.sum(0).topk(100).indices.sort().values
    each = unit((0,), VerticalSlash(100, 128, sink=0, window=1), Lines(columns, torch.tensor([3])))
    kept, true = measured(q, k, each)
    bins = by_distance(p_RS, rows, 18)
    of_diagonal = bins[4:8] @ torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=torch.float64)
    sum_of_masses = float(p_RS.sum(0)[columns].sum() + of_diagonal + p_RS[range(64), rows].sum()) / 64
    assert sum_of_masses > true + 0.2
    assert abs(kept - true) <= allowed


def test_rows_that_a_pattern_makes_dense_are_measured_as_sparse():
    q, k = plant(VIDEO, [Noise()], noise=1.0)
    for pattern, chosen in (
        (Grid(sink=4, window=16), Phases(Axis.FRAME, torch.tensor([3]), NONE)),
        (TriShape(4, 16, last=64), Nothing()),
    ):
        kept, true = measured(q, k, unit((0,), pattern, chosen))
        assert kept == pytest.approx(true, abs=1e-6) and kept < 0.3
    kept, _ = measured(q, k, unit((0,), Dense(), Nothing()))
    assert kept == pytest.approx(1, abs=1e-6)


def test_a_unit_has_the_mean_of_its_heads():
    q, k = plant(VIDEO, [Columns(), Line(Axis.FRAME, 7)], group=2, columns=(100, 300))
    lines = Lines(torch.tensor([100, 300]), torch.tensor([], dtype=torch.int64))
    pattern = VerticalSlash(2, 0, sink=0, window=1)
    first, second, both = (measured(q, k, unit(heads, pattern, lines))[0] for heads in ((0,), (1,), (0, 1)))
    assert first > 0.9 and second < 0.1 and both == pytest.approx((first + second) / 2)


def recall_here(each, q, k, rows, keys, peers):
    held = Held(q, k, rows, keys, 1.0, peers, range(len(VIDEO)))
    return measure_recall(held, take_probe(held, Modality.VIDEO, [each.heads]), [each])


@pytest.mark.parametrize("ranks", range(1, 9))
def test_all_ranks_measure_the_same(ranks):
    q, k = plant(VIDEO, [Line(Axis.FRAME, 7)], logit=4.0, noise=1.0)
    for pattern, chosen in (
        (Grid(sink=4, window=16, slash=1), Phases(Axis.FRAME, torch.tensor([7]), torch.tensor([[0, 3]]))),
        (AShape(4, 300), Nothing()),
    ):
        each = unit((0,), pattern, chosen, Modality.VIDEO)
        _, true = measured(q, k, each, Modality.VIDEO)
        kept = spread(partial(recall_here, each), q, k, VIDEO, random_shards(len(VIDEO), ranks, seed=ranks))
        assert len({value for (value,) in kept}) == 1 and kept[0][0] == pytest.approx(true, abs=1e-6)
