"""Random mixes of runs: every new row is computed once, tables invert each other, no rank is far above the mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.balance import imbalance, prompt
from sglang_mm.parallel.layout import make_layout
from sglang_mm.types import BatchLayout

pytestmark = pytest.mark.usefixtures("one_thread")
RANKS = st.integers(1, 8)
text = st.tuples(st.integers(1, 9000), st.just(1), st.just("text"))
short = st.tuples(st.integers(1, 40), st.just(1), st.just("text"))
image = st.tuples(st.integers(1, 5000), st.just(1), st.just("image"))
video = st.tuples(st.integers(1, 700), st.integers(1, 60)).map(lambda v: (v[0] * v[1], v[0], "video"))
START = st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 2_000_000))
PARTS = st.lists(st.one_of(text, short, short, image, video), min_size=1, max_size=9)


@given(ranks=RANKS, parts=PARTS, start=START)
@settings(max_examples=100, deadline=None)
def test_every_row_once_and_tables_invert(ranks, parts, start):
    runs = prompt(*parts, start=start)
    layout = make_layout(runs, ranks)
    assert torch.equal(torch.cat(layout.rows).sort().values, torch.arange(start, runs[-1].stop))
    assert all((rows[1:] > rows[:-1]).all() for rows in layout.rows)
    owner, slot = layout.owner(), layout.slot()
    for rank, rows in enumerate(layout.rows):
        assert (owner[rows - start] == rank).all()
        assert torch.equal(slot[rows - start], torch.arange(len(rows)))
    pairs = layout.attended_pairs()
    assert 2 * sum(pairs) == layout.length * (start + 1 + runs[-1].stop)
    assert pairs[0] == sum(position + 1 for position in layout.rows[0].tolist())
    assert layout.digest() == make_layout(list(runs), ranks).digest()


@given(ranks=RANKS, parts=PARTS, start=START)
@settings(max_examples=300, deadline=None)
def test_no_rank_is_far_above_the_mean(ranks, parts, start):
    missing = 256 * ranks - sum(length for length, _, _ in parts)
    parts = [*parts, (missing, 1, "text")] if missing > 0 else parts
    layout = make_layout(prompt(*parts, start=start), ranks)
    rows, pairs = imbalance(layout)
    assert rows <= 1.05 and pairs <= 1.05


@given(ranks=RANKS, gap=st.integers(1, 20), length=st.integers(0, 3), start=START)
@settings(max_examples=100, deadline=None)
def test_short_runs_between_long_ones_of_the_smallest_size(ranks, gap, length, start):
    """The hardest mix for stripes: neighbours in the snake lie a long run apart."""
    layout = make_layout(prompt(*[(gap, 1, "text"), (256 * ranks + length, 1, "image")] * 8, start=start), ranks)
    assert max(imbalance(layout)) <= 1.05


@given(ranks=RANKS, requests=st.lists(st.tuples(PARTS, START), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_batches_cover_the_flat_rows(ranks, requests):
    batch = BatchLayout(tuple(make_layout(prompt(*parts, start=start), ranks) for parts, start in requests))
    held = [batch.flat(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(batch.offsets[-1]))
    for rank, flat in enumerate(held):
        assert len(flat) == batch.rows(rank) == batch.segments(rank)[-1].stop
        for layout, offset, segment in zip(batch.requests, batch.offsets, batch.segments(rank)):
            assert torch.equal(flat[segment] - offset + layout.start, layout.rows[rank])
