"""A prompt that comes in chunks: a probe of each chunk's own, class masses of all chunks so far."""

from functools import partial

import pytest
import torch

from sglang_mm.patterns.boundary import NoBoundary, QBoundary
from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import select
from sglang_mm.patterns.select.masses import FIXED_POINT
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.naive import by_class, probabilities
from tests.patterns.planted import Line, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(80, 4, 6), Text(30))
GRID = Grid(axis="frame", sink=8, window=64)
PLANS = [
    ((0,), QBoundary(video=GRID)),
    ((1,), NoBoundary(Blocks())),
    ((2,), QBoundary(video=VerticalSlash(9, 0, 8, 64))),
]
CHUNKS = [range(700), range(700, 1500), range(1500, 1990)]


def select_chunk(chunk, plans, previous, q, k, **options):
    rows, keys = Shard(TOKENS, torch.arange(chunk.start, chunk.stop)), Shard(TOKENS, torch.arange(chunk.stop))
    part = q[chunk.start : chunk.stop], k[: chunk.stop]
    return select(plans, *part, rows, keys, scale=1.0, chunk=chunk, previous=previous, **options)


def test_every_chunk_has_a_recall_of_its_own():
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)] * 3, noise=1.0)
    masses = {}
    for chunk in CHUNKS:
        selection, report = select_chunk(chunk, PLANS, masses, q, k)
        masses = report.class_masses
        (verdict,) = [each for each in report.verdicts if each.heads == (0,) and each.rows == Modality.VIDEO]
        assert verdict.is_sparse and verdict.recall >= 0.9
        assert next(
            each for each in selection.units[0].panels if each.rows == Modality.VIDEO
        ).chosen.classes.tolist() == [7]
        listed = selection.units[1].panels[0]
        assert isinstance(listed.pattern, Blocks)
        assert listed.chosen.row_blocks.tolist() == list(range(chunk.start // 128, (chunk.stop - 1) // 128 + 1))
        assert int(listed.chosen.key_blocks.max()) <= (chunk.stop - 1) // 128


def test_class_masses_are_the_sums_over_chunks():
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)] * 3, logit=3.0, noise=1.0)
    masses, total, pairs = {}, torch.zeros(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for chunk, rows in zip(CHUNKS, (range(636, 700), range(1436, 1500), range(1896, 1960))):
        masses = select_chunk(chunk, PLANS, masses, q, k)[1].class_masses
        p = probabilities(q, k, rows)[0]
        unseen = torch.ones(64, len(TOKENS), dtype=torch.float64).tril(rows.start)
        unseen[:, :8], unseen[:, rows.stop - 64 :] = 0, 0
        total += by_class(p * unseen, TOKENS.classes(Axis.FRAME))
        pairs += by_class(unseen, TOKENS.classes(Axis.FRAME))
    (found,) = masses.values()
    torch.testing.assert_close(found.mass[:24].double() / FIXED_POINT, total, rtol=1e-5, atol=1e-6)
    assert found.pairs[:24].tolist() == pairs.tolist()


def test_a_chunk_that_shows_nothing_takes_what_the_ones_before_showed():
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)])
    q[700:] = 0
    plans = PLANS[:1]
    masses = select_chunk(CHUNKS[0], plans, {}, q, k)[1].class_masses
    found = []
    for previous in (masses, {}):
        selection, _ = select_chunk(CHUNKS[1], plans, previous, q, k, theta=1e-9)
        found.append(selection.units[0].panels[-1].chosen.classes.tolist())
    assert found[0] == [7] != found[1]


def test_a_chunk_without_rows_of_a_modality():
    """There is nothing to decide, the unit has all panels, and masses go on to the next chunk."""
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)])
    before = select_chunk(range(700), PLANS[:1], {}, q, k)[1].class_masses
    selection, report = select_chunk(range(1965, 1990), PLANS[:1], before, q, k)
    assert [verdict.rows for verdict in report.verdicts] == [Modality.TEXT] and not report.fallbacks
    assert [panel.rows for panel in selection.units[0].panels] == [Modality.TEXT, Modality.VIDEO]
    assert report.class_masses.keys() == before.keys()


def chunk_here(previous, q, k, rows, keys, peers):
    return select(PLANS, q, k, rows, keys, scale=1.0, chunk=CHUNKS[1], previous=previous, peers=peers)


def test_ranks_agree_on_a_chunk():
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)] * 3, noise=1.0)
    previous = select_chunk(CHUNKS[0], PLANS, {}, q, k)[1].class_masses
    expected, told = select_chunk(CHUNKS[1], PLANS, previous, q, k)
    for ranks in (2, 5):
        rows = random_shards(CHUNKS[1].stop, ranks, first=CHUNKS[1].start)
        keys = random_shards(CHUNKS[1].stop, ranks, seed=8)
        for selection, report in spread(partial(chunk_here, previous), q, k, TOKENS, rows, keys):
            assert selection.digest() == expected.digest()
            assert report.densities == pytest.approx(told.densities)
