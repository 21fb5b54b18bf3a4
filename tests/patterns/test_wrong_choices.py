"""Controls: readings of the method that are easy to take for it choose other sets, and lose what ours keep.

Each test works out the right choice and the wrong one from the whole table of probabilities, and asks for ours.
Names of axes as in naive.py.
"""

from itertools import pairwise

import pytest
import torch

from sglang_mm.patterns.catalog import Grid, VerticalSlash
from sglang_mm.patterns.chosen import Panel, Phases, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.select.choose import choose
from sglang_mm.patterns.select.heaviest import heaviest
from sglang_mm.patterns.select.masses import Want
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import by_class, hold, probabilities, recall
from tests.patterns.planted import Line, plant

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
VIDEO = token_map(Text(40), Media(40, 4, 6), Text(90))
LAST_FRAMES = range(936, 1000)
LIGHT_AND_HEAVY = token_map(Text(10), Media(12, 3, 5), Text(9), Media(40, 4, 6))
NO_SHIFTS = torch.zeros(0, 2, dtype=torch.int64)


def one(q, k, tokens, pattern, modality, heads=(0,)):
    held = hold(q, k, tokens)
    (chosen,), _ = choose(held, take_probe(held, modality, [heads]), [heads], [Want(0, None, pattern)], {})
    return chosen


def mean_mass(p_RS, tokens, axis, grid):
    """[C]: mass by class over pairs of a row and a key that sink and window may hide."""
    unseen_RS = torch.ones_like(p_RS).tril(p_RS.shape[1] - len(p_RS))
    unseen_RS[:, : grid.sink], unseen_RS[:, p_RS.shape[1] - grid.window :] = 0, 0
    classes = tokens.classes(axis)
    return by_class(p_RS * unseen_RS, classes) / by_class(unseen_RS, classes).clamp(min=1)


def seen(pattern, chosen, tokens, heads=(0,)):
    return unit_mask(Unit(heads, (Panel(None, None, pattern, chosen),)), tokens, sparse_rows=True)


def test_a_group_has_one_selection_from_the_sum_of_its_heads_and_not_one_each():
    draw = torch.Generator().manual_seed(1)
    q, k = (2 * torch.randn(len(VIDEO), heads, 8, generator=draw) for heads in (3, 1))
    pattern = VerticalSlash(vertical=25, slash=0, sink=8, window=100)
    mass_HS = probabilities(q, k, LAST_FRAMES).sum(1)
    mass_HS[:, :8], mass_HS[:, 1000 - 100 :] = 0, 0
    summed = mass_HS.sum(0).topk(25).indices.sort().values
    ours = one(q, k, VIDEO, pattern, Modality.VIDEO, (0, 1, 2))
    assert torch.equal(ours.columns, summed)
    for head in range(3):
        own = one(q, k, VIDEO, pattern, Modality.VIDEO, (head,))
        assert torch.equal(own.columns, mass_HS[head].topk(25).indices.sort().values)
        assert len(set(own.columns.tolist()) - set(summed.tolist())) >= 5
        assert not torch.equal(seen(pattern, own, VIDEO), seen(pattern, ours, VIDEO))


def test_rows_of_video_are_probed_at_the_end_of_the_video_and_not_of_the_prompt():
    """The video's rows attend to places of class 7, the question after it to class 3."""
    (video, k), (question, _) = plant(VIDEO, [Line(Axis.FRAME, 7)]), plant(VIDEO, [Line(Axis.FRAME, 3)])
    q = torch.where((VIDEO.modality == Modality.VIDEO)[:, None, None], video, question)
    grid = Grid(axis="frame", sink=8, window=64)
    p_RS = probabilities(q, k, LAST_FRAMES)[0]
    ours, of_the_end = (one(q, k, VIDEO, grid, modality) for modality in (Modality.VIDEO, None))
    assert ours.classes.tolist() == [int(mean_mass(p_RS[:, :1000], VIDEO, Axis.FRAME, grid).argmax())] == [7]
    assert of_the_end.classes.tolist() == [3]
    kept, lost = (
        recall(p_RS[None], LAST_FRAMES, Unit((0,), (Panel(None, None, grid, each),)), VIDEO)
        for each in (ours, of_the_end)
    )
    assert kept > 0.95 and lost < 0.2


def test_classes_are_taken_from_each_name_space_and_not_from_all_together():
    """Two videos of frames of 3 x 5 and 4 x 6: of the lighter one's lines none is as heavy as the other's second."""
    lines = [Line(Axis.FRAME, 15 + 7), Line(Axis.FRAME, 15 + 9), Line(Axis.FRAME, 4)]
    queries = [plant(LIGHT_AND_HEAVY, [line], logit=logit) for line, logit in zip(lines, (10.0, 9.5, 8.0))]
    q, k = sum(each for each, _ in queries), queries[0][1]
    grid = Grid(axis="frame", sink=2, window=64)
    rows = range(len(LIGHT_AND_HEAVY) - 64, len(LIGHT_AND_HEAVY))
    p_RS = probabilities(q, k, rows)[0]
    mean = mean_mass(p_RS, LIGHT_AND_HEAVY, Axis.FRAME, grid)
    classes = LIGHT_AND_HEAVY.classes(Axis.FRAME)
    assert classes.starts == (0, 15, 39)
    of_each = [start + int(mean[start:stop].argmax()) for start, stop in pairwise(classes.starts)]
    ours = one(q, k, LIGHT_AND_HEAVY, grid, Modality.VIDEO)
    assert ours.classes.tolist() == of_each == [4, 15 + 7]

    as_many = torch.tensor([len(of_each)])
    of_all = heaviest(mean[None], as_many, torch.zeros_like(classes.spaces))[0].nonzero().flatten()
    assert of_all.tolist() == mean.topk(2).indices.sort().values.tolist() == [15 + 7, 15 + 9]
    lightest = (LIGHT_AND_HEAVY.item == 0) & (torch.arange(len(LIGHT_AND_HEAVY)) >= 2)
    shown = [
        int(seen(grid, Phases(Axis.FRAME, chosen, NO_SHIFTS), LIGHT_AND_HEAVY)[rows.start :, lightest].sum())
        for chosen in (ours.classes, of_all)
    ]
    assert shown == [64 * 12, 0]  # one place of each of 12 frames, and none


def peak_over_mean(p_RS, tokens, grid):
    """The axis whose heaviest class stands out most from its axis' mean class."""
    frame, row = (mean_mass(p_RS, tokens, axis, grid) for axis in Axis)
    return Axis.FRAME if frame.max() / frame.mean() >= row.max() / row.mean() else Axis.ROW


@pytest.mark.parametrize("noise", [0.5, 1.0])
@pytest.mark.parametrize("klass", range(6))
def test_a_column_of_every_row_is_the_row_axis_and_not_the_peak_over_the_mean(klass, noise):
    """Frame by frame the column is four classes, and the heaviest of four is never below their mean."""
    q, k = plant(VIDEO, [Line(Axis.ROW, klass)], noise=noise)
    grid = Grid(sink=8, window=64)
    p_RS = probabilities(q, k, LAST_FRAMES)[0]
    assert peak_over_mean(p_RS[:, :1000], VIDEO, grid) == Axis.FRAME
    ours = one(q, k, VIDEO, grid, Modality.VIDEO)
    assert ours.axis == Axis.ROW and ours.classes.tolist() == [klass]
    by_peak = one(q, k, VIDEO, Grid(axis="frame", sink=8, window=64), Modality.VIDEO)
    assert by_peak.classes.tolist()[0] % 6 == klass  # the best that the other axis has
    kept, lost = (
        recall(p_RS[None], LAST_FRAMES, Unit((0,), (Panel(None, None, grid, each),)), VIDEO) for each in (ours, by_peak)
    )
    assert kept > 0.95 and lost < 0.5


@pytest.mark.parametrize("klass", [0, 13, 23])
def test_both_rules_agree_on_a_place_of_every_frame(klass):
    """So that the rule above is no straw man."""
    q, k = plant(VIDEO, [Line(Axis.FRAME, klass)], noise=1.0)
    grid = Grid(sink=8, window=64)
    assert peak_over_mean(probabilities(q, k, LAST_FRAMES)[0][:, :1000], VIDEO, grid) == Axis.FRAME
    assert one(q, k, VIDEO, grid, Modality.VIDEO).axis == Axis.FRAME
