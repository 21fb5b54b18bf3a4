"""Frames of any size over any number of ranks: contiguous, even, and every needed token sent exactly once."""

from itertools import accumulate, chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.vision import plan_exchange, split_frames
from sglang_mm.types import BatchLayout, Frame, Run

pytestmark = pytest.mark.usefixtures("one_thread")
GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 300)), max_size=25)


def frames_from(sizes: list[tuple[int, int]]) -> list[Frame]:
    stops = accumulate(gap + length for gap, length in sizes)
    return [Frame(i, 0, stop - length, length) for i, ((_, length), stop) in enumerate(zip(sizes, stops))]


@given(ranks=st.integers(1, 8), sizes=GAPS_AND_LENGTHS)
@settings(max_examples=200, deadline=None)
def test_split_is_contiguous_and_even(ranks, sizes):
    frames = frames_from(sizes)
    split = split_frames(frames, ranks)
    assert len(split) == ranks and list(chain(*split)) == list(range(len(frames)))
    loads = [sum(frames[i].length for i in held) for held in split]
    assert max(loads) <= sum(loads) / ranks + max((frame.length for frame in frames), default=0)


@given(ranks=st.integers(1, 8), sizes=GAPS_AND_LENGTHS, start=st.integers(0, 500), length=st.integers(1, 3000))
@settings(max_examples=150, deadline=None)
def test_tables_of_all_ranks_fit(ranks, sizes, start, length):
    frames, layout = frames_from(sizes), BatchLayout((make_layout([Run(start, length)], ranks),))
    exchange = plan_exchange([frames], layout)
    arrived = []
    for source, pairs in enumerate(exchange.encode):
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(f.start, f.stop) for _, f in pairs)])
        for owner in range(ranks):
            sent, filled = positions[exchange.sent(source, owner)], exchange.filled(owner, source)
            assert torch.equal(layout.requests[0].rows[owner][filled], sent)
            arrived += sent.tolist()
    needed = [p for frame in frames for p in range(frame.start, frame.stop) if start <= p < start + length]
    assert sorted(arrived) == needed
