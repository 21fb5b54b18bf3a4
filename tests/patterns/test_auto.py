"""Selection without a plan: each head gets the cheapest candidate that keeps enough; unstructured heads stay dense."""

import logging

import pytest
import torch

from sglang_mm.patterns.boundary import QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.density import density
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import auto_select, candidates_for, select
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.planted import Columns, Diagonal, Line, Noise, Shift, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(80, 4, 6), Text(30))
SMALL = {"sink": 8, "window": 64}
SHORT = (
    AShape(8, 300),
    Grid(axis="frame", **SMALL),
    Grid(axis="row", **SMALL),
    VerticalSlash(12, 128, **SMALL),
    Blocks(),
)
IN_BLOCKS = tuple(range(256, 384))
PLANTS = [Line(Axis.FRAME, 7), Line(Axis.ROW, 3), Diagonal(4), Columns(), Noise()]
UNITS = [(head,) for head in range(5)]


def auto(q, k, tokens=TOKENS, layer=2, units=UNITS, candidates=SHORT, **options):
    everything = Shard(tokens, torch.arange(len(tokens)))
    return auto_select(units, layer, q, k, everything, everything, scale=1.0, candidates=candidates, **options)


def of_video(selection):
    return [next(p for p in unit.panels if p.rows == Modality.VIDEO) for unit in selection.units]


def test_each_head_gets_its_pattern(caplog):
    q, k = plant(TOKENS, PLANTS, noise=1.0, columns=IN_BLOCKS)
    with caplog.at_level(logging.INFO, "sglang_mm"):
        selection, report = auto(q, k)
    print(f"\n{report}")
    frame, row, diagonal, blocks, noise = of_video(selection)
    assert frame.pattern == SHORT[1] and frame.chosen.classes.tolist() == [7]
    assert row.pattern == SHORT[2] and row.chosen.classes.tolist() == [3]
    assert diagonal.pattern == SHORT[3] and diagonal.chosen.diagonals.tolist() == [4]
    assert blocks.pattern == Blocks() and isinstance(noise.pattern, Dense)
    verdicts = [verdict for verdict in report.verdicts if verdict.rows == Modality.VIDEO]
    assert all(verdict.recall >= 0.9 for verdict in verdicts)
    for verdict in verdicts:  # a dearer candidate is not tried where a cheaper one has enough
        assert 1 <= len(verdict.trials) <= 5
        assert all(trial.recall < 0.9 for trial in verdict.trials[: -1 if verdict.is_sparse else None])
    assert verdicts[4].reason == "dense: recall below 0.9"
    assert [record.levelname for record in caplog.records] == ["INFO"] and "layer 2" in caplog.text


def test_the_cheapest_of_those_that_keep_enough():
    """Sinks and neighbours suffice: every candidate keeps enough, and the order they are named in does not matter."""
    q, k = plant(TOKENS, [Columns()], columns=(0, 1, 2))
    for candidates in (SHORT, SHORT[::-1]):
        selection, report = auto(q, k, units=[(0,)], candidates=candidates)
        trials = next(verdict.trials for verdict in report.verdicts if verdict.rows == Modality.VIDEO)
        assert all(trial.recall >= 0.9 for trial in trials)
        costs = {}
        for candidate in SHORT[:4]:
            plan = QBoundary(video=candidate)
            everything = Shard(TOKENS, torch.arange(len(TOKENS)))
            planned, _ = select([((0,), plan)], q, k, everything, everything, scale=1.0)
            costs[candidate] = density(planned.units[0], TOKENS)
        assert of_video(selection)[0].pattern == min(costs, key=costs.get) == SHORT[1]


def test_recall_decides_before_cost():
    """The cheapest candidate alone loses the line; with a theta that it reaches it is taken."""
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)])
    candidates = (AShape(8, 100), Grid(axis="frame", sink=8, window=300))
    strict, _ = auto(q, k, units=[(0,)], candidates=candidates)
    loose, report = auto(q, k, units=[(0,)], candidates=candidates, theta=0.05)
    assert of_video(strict)[0].pattern == candidates[1] and of_video(loose)[0].pattern == candidates[0]
    assert 0.05 < next(v.recall for v in report.verdicts if v.rows == Modality.VIDEO) < 0.2


def test_every_modality_of_rows_is_measured_on_its_own():
    """Rows of text attend to marked columns, rows of video to a class."""
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)], columns=(100, 500, 900))
    text, _ = plant(TOKENS, [Columns()], columns=(100, 500, 900))
    q[1960:] = text[1960:]
    selection, _ = auto(
        q, k, units=[(0,)], candidates=(Grid(axis="frame", tail=False, **SMALL), VerticalSlash(3, 0, **SMALL))
    )
    of_text, of_frames = selection.units[0].panels
    assert (of_text.rows, of_text.chosen.columns.tolist()) == (Modality.TEXT, [100, 500, 900])
    assert (of_frames.rows, of_frames.chosen.classes.tolist()) == (Modality.VIDEO, [7])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layers_are_dense_without_a_look(layer):
    q, k = (torch.full((len(TOKENS), 1, 4), float("nan")) for _ in range(2))
    selection, report = auto(q, k, layer=layer, units=[(0,)])
    assert all(isinstance(panel.pattern, Dense) for panel in selection.units[0].panels)
    assert report.fallbacks == {"dense: one of the first layers": 2} and report.densities == (1.0,)


def test_recall_too_low_for_all_is_dense():
    q, k = plant(TOKENS, [Diagonal(3)], noise=10.0)
    selection, report = auto(q, k, units=[(0,)])
    assert isinstance(of_video(selection)[0].pattern, Dense)
    assert report.fallbacks["dense: recall below 0.9"] >= 1


def test_a_prompt_of_text_tries_no_grids():
    tokens = token_map(Text(1500))
    q, k = plant(tokens, [Columns()], columns=(100, 500))
    selection, report = auto(q, k, tokens, units=[(0,)])
    tried = [pattern for trial in report.verdicts[0].trials for _, pattern in trial.patterns]
    assert tried and not any(isinstance(pattern, Grid) for pattern in tried)
    assert selection.units[0].panels[0].pattern == SHORT[3]


def test_a_short_prompt_is_dense_with_the_candidates_of_long_ones():
    """The window of 4096 covers it."""
    q, k = plant(TOKENS, [Columns()], columns=(0, 1))
    far = candidates_for(1 << 20)[1]
    assert far == AShape()
    selection, report = auto(q, k, units=[(0,)], candidates=(far,))
    assert isinstance(of_video(selection)[0].pattern, Dense)
    (verdict,) = [each for each in report.verdicts if each.rows == Modality.VIDEO]
    assert not verdict.trials and verdict.reason == "dense: no candidate computes less than 0.75 of the pairs"


def test_candidates_of_long_prompts_have_the_patterns_own_sizes():
    full = candidates_for(1 << 16)
    own = {AShape(), Grid(axis="frame"), Grid(axis="row"), VerticalSlash(), Blocks()}
    assert own < set(full) and len(full) == 9
    assert candidates_for(1 << 20) == full != candidates_for((1 << 16) - 4096)


def test_sizes_follow_the_length():
    near, far, *_, few, many, _ = candidates_for(6000)
    assert (near, far) == (AShape(16, 128), AShape(16, 384))
    assert (few, many) == (VerticalSlash(128, 256, 16, 128), VerticalSlash(384, 256, 16, 128))
    assert [each.axis for each in candidates_for(6000) if isinstance(each, Grid) and each.slash] == ["frame", "row"]


@pytest.mark.parametrize("tokens", [1, 100, 1990, 5000, 12_345, 65_535, 70_000])
def test_candidates_differ_and_are_whole_tiles(tokens):
    found, full = candidates_for(tokens), candidates_for(1 << 16)
    assert len(set(found)) == len(found) and {type(each) for each in found} == {type(each) for each in full}
    largest = {"window": 4096, "vertical": 4000, "slash": 2048, "sink": 128}
    for name, most in largest.items():
        sizes = {getattr(each, name, None) for each in found} - {None, 0, 1}
        tile = 16 if name == "sink" else 128
        assert all(size % tile == 0 or size == 1000 or size == 4000 for size in sizes)
        assert max(sizes) >= min(tile, most) and max(sizes) <= most
        assert max(sizes) - tile < most * min(1, tokens / (1 << 16))


def test_a_grid_of_differences_is_found_at_any_length():
    """Each place looks at itself in all frames, then each column; no line of one class has half of either."""
    tokens = token_map(Text(40), Media(60, 8, 10), Text(30))
    wanted = [(Shift(Axis.FRAME, 0), "frame"), (Shift(Axis.ROW, 3), "row"), (Line(Axis.FRAME, 7), "frame")]
    q, k = plant(tokens, [each for each, _ in wanted], noise=1.0)
    selection, report = auto(q, k, tokens, units=[(0,), (1,), (2,)], candidates=None)
    print(f"\n{report}")
    for (_, axis), panel in zip(wanted, of_video(selection)):
        assert isinstance(panel.pattern, Grid) and panel.chosen.axis == axis
    shifts = [panel.chosen.shifts.tolist() for panel in of_video(selection)]
    assert shifts == [[[0, 0]], [[0, 3]], []]


def test_heads_that_need_no_lines_take_none():
    """Otherwise rounding would choose their class."""
    q, k = plant(TOKENS, [Columns()], columns=(0, 1, 2))
    selection, _ = auto(q, k, units=[(0,)], candidates=None)
    assert of_video(selection)[0].pattern == candidates_for(len(TOKENS))[0]


def test_all_chunks_have_the_candidates_of_the_prompt():
    """Class masses are handed on by pattern."""
    tokens = token_map(Text(40), Media(900, 4, 6), Text(30))
    assert candidates_for(1200)[2] != candidates_for(len(tokens))[2]
    q, k = plant(tokens, [Line(Axis.FRAME, 7)])
    found, masses = [], {}
    for chunk in (range(1200), range(1200, len(tokens))):
        rows, keys = (Shard(tokens, torch.arange(start, chunk.stop)) for start in (chunk.start, 0))
        part = q[chunk.start : chunk.stop], k[: chunk.stop]
        _, report = auto_select([(0,)], 2, *part, rows, keys, scale=1.0, chunk=chunk, previous=masses)
        masses = report.class_masses
        found.append({key for key in masses if key[1] == Modality.VIDEO})
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_chunk_without_video_decides_for_text_alone():
    q, k = plant(TOKENS, [Columns()], columns=(100, 500))
    rows, keys = Shard(TOKENS, torch.arange(1965, 1990)), Shard(TOKENS, torch.arange(1990))
    selection, report = auto_select(
        [(0,)], 5, q[1965:], k, rows, keys, scale=1.0, chunk=range(1965, 1990), candidates=SHORT
    )
    assert [verdict.rows for verdict in report.verdicts] == [Modality.TEXT]
    assert [panel.rows for panel in selection.units[0].panels] == [Modality.TEXT, Modality.VIDEO]


def auto_here(q, k, rows, keys, peers):
    return auto_select([(0, 1), (2,), (3,), (4, 5)], 2, q, k, rows, keys, scale=1.0, candidates=SHORT, peers=peers)


def test_any_number_of_ranks_selects_alike():
    q, k = plant(TOKENS, [*PLANTS[:2], *PLANTS[2:], Noise()], group=2, noise=1.0, columns=IN_BLOCKS)
    ((expected, told),) = spread(auto_here, q, k, TOKENS, [torch.arange(len(TOKENS))])
    kept = {type(panel.pattern) for unit in expected.units for panel in unit.panels}
    assert {Blocks, Dense} < kept
    for ranks in (2, 3, 5, 7, 8):
        shards = random_shards(len(TOKENS), ranks, seed=ranks)
        for selection, report in spread(auto_here, q, k, TOKENS, shards):
            assert selection.digest() == expected.digest()
            assert report.densities == pytest.approx(told.densities)
            assert [str(v.kept) + v.reason for v in report.verdicts] == [str(v.kept) + v.reason for v in told.verdicts]
