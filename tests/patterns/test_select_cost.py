"""Costs and densities are those of the chunk's rows, against the oracle's mask; densities wait until they are asked."""

from functools import partial

import pytest
import torch

from sglang_mm.patterns.boundary import QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import auto_select, select
from sglang_mm.patterns.select.draft import Draft
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.planted import Line, plant
from tests.patterns.ranks import random_shards, spread

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
TOKENS = token_map(Text(40), Media(80, 4, 6), Text(30))
SMALL = {"sink": 8, "window": 64}
PATTERNS = [AShape(8, 300), Grid(axis="frame", **SMALL), VerticalSlash(9, 256, **SMALL), Blocks(0.5), Dense()]
PLANS = [((head,), QBoundary(video=pattern)) for head, pattern in enumerate(PATTERNS)]
CHUNKS = [range(700), range(700, 1500), range(1500, 1990), range(1965, 1990)]


def share_of_mask(unit, chunk):
    """Of the chunk's causal pairs; a unit of one panel: of those with rows of its modality."""
    is_row = torch.ones(len(TOKENS), dtype=torch.bool)
    if len(unit.panels) == 1:
        is_row = TOKENS.modality == unit.panels[0].rows
    is_row = is_row & torch.isin(torch.arange(len(TOKENS)), torch.tensor(chunk))
    return int(unit_mask(unit, TOKENS)[is_row].sum()) / int((is_row.nonzero() + 1).sum())


def part(chunk):
    rows, keys = Shard(TOKENS, torch.arange(chunk.start, chunk.stop)), Shard(TOKENS, torch.arange(chunk.stop))
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)] * len(PLANS), noise=1.0)
    return q[chunk.start : chunk.stop], k[: chunk.stop], rows, keys


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_density_is_that_of_the_chunks_rows(chunk):
    selection, report = select(PLANS, *part(chunk), scale=1.0, chunk=chunk, theta=1e-9)
    if chunk.start < 1960:
        kept = {type(panel.pattern) for unit in selection.units for panel in unit.panels}
        assert kept == {type(pattern) for pattern in PATTERNS}
    assert report.densities == pytest.approx([share_of_mask(unit, chunk) for unit in selection.units])


@pytest.mark.parametrize("chunk", CHUNKS[:3], ids=str)
def test_candidates_are_priced_over_the_same_rows(chunk):
    """Blocks like all others: rows before the chunk, in the block that it starts in, are nobody's."""
    draft = Draft([(0,)], *part(chunk), scale=1.0, chunk=chunk)
    probe = draft.probe(Modality.VIDEO, [0])
    sets = draft.choose(probe, [(0, ((None, pattern),)) for pattern in PATTERNS])
    assert draft.shares(sets) == pytest.approx([share_of_mask(Unit((0,), each), chunk) for each in sets])


def plan_here(q, k, rows, keys, peers):
    _, report = select(PLANS, q, k, rows, keys, scale=1.0, chunk=CHUNKS[1], theta=1e-9, peers=peers)
    return report.densities if peers.rank == 1 else report


def test_one_rank_may_ask_alone():
    chunk = CHUNKS[1]
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7)] * len(PLANS), noise=1.0)
    selection, _ = select(PLANS, *part(chunk), scale=1.0, chunk=chunk, theta=1e-9)
    rows, keys = (random_shards(chunk.stop, 3, seed, first) for seed, first in ((0, chunk.start), (8, 0)))
    first, found, _ = spread(plan_here, q, k, TOKENS, rows, keys)
    assert found == pytest.approx([share_of_mask(unit, chunk) for unit in selection.units])
    assert first.densities == found


@pytest.mark.parametrize("how", [partial(select, PLANS), partial(auto_select, [(0,), (1,)], 2)], ids=["plan", "auto"])
def test_nobody_counts_densities_unasked(how):
    _, report = how(*part(range(len(TOKENS))), scale=1.0)
    assert report.summary() in str(report) and "densities" not in vars(report)
    first = report.densities
    assert report.densities is first and 0 < min(first) <= max(first) <= 1
