"""A prompt prefilled chunk by chunk is attended as in one shot, given the same selection."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exactness.layers import Layer, attend_by, times_shown_by
from tests.exactness.oracle import assert_exact
from tests.exactness.strategies import layers, seeds, some

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


@settings(deadline=None, max_examples=15)
@given(st.data(), layers(), seeds)
def test_chunks_are_one_shot(data, layer: Layer, seed):
    """Rows of a chunk meet the pieces of all chunks so far, of all ranks; later keys are not there yet."""
    borders = [0, *some(data.draw, len(layer.tokens), 3).tolist(), len(layer.tokens)]
    chunks = [[within(mine, *limits) for mine in layer.rows] for limits in pairwise(borders)]
    programs, met = [], []
    for chunk in chunks:
        met += chunk
        for mine in chunk:
            programs += layer.programs_of(mine, met)
    assert torch.equal(times_shown_by(programs), layer.times_shown())
    qkv = layer.random_qkv(seed=seed)
    merges = layer.merges * len(chunks)
    assert_exact(attend_by(programs, *qkv), *qkv, layer.seen_by_head(), merges)


def within(positions: Tensor, first: int, stop: int) -> Tensor:
    return positions[(positions >= first) & (positions < stop)]
