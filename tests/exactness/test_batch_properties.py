"""A row's result does not depend on what is compiled and attended beside it, to the last bit."""

from dataclasses import replace
from itertools import accumulate, zip_longest

import pytest
import torch
from hypothesis import given, settings

from sglang_mm.kernels import empty_state
from sglang_mm.patterns.chosen import Selection
from tests.exactness.layers import DIM, Layer, add
from tests.exactness.strategies import layers, seeds

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NAN = float("nan")


@settings(deadline=None, max_examples=8)
@given(layers(), seeds)
def test_a_unit_alone_or_among_others(layer: Layer, seed):
    qkv = layer.random_qkv(torch.float32, seed)
    out, lse = layer.attend(*qkv)
    shown = layer.times_shown()
    for number, unit in enumerate(layer.selection.units):
        alone = replace(layer, selection=Selection((unit,), layer.selection.group))
        assert torch.equal(alone.times_shown()[0], shown[number])
        heads = list(unit.heads)
        own_out, own_lse = alone.attend(*qkv)
        assert torch.equal(own_out[:, heads], out[:, heads]) and torch.equal(own_lse[heads], lse[heads])


@settings(deadline=None, max_examples=8)
@given(layers(), layers(), seeds)
def test_two_requests_alone_or_side_by_side(first: Layer, second: Layer, seed):
    """Side by side: in one buffer, with NaN around each, and a program of the one after a program of the other."""
    pair = first, second
    inputs = [layer.random_qkv(torch.float32, seed) for layer in pair]
    states = [empty_state(q) for q, _, _ in inputs]
    views = [side_by_side([each[part] for each in inputs]) for part in range(3)]
    for steps in zip_longest(*(fresh(layer).programs for layer in pair)):
        for step, state, *qkv in zip(steps, states, *views):
            if step is not None:
                add(step, state, *qkv)
    for layer, qkv, state in zip(pair, inputs, states):
        assert all(torch.equal(got, want) for got, want in zip(state, layer.attend(*qkv)))


def fresh(layer: Layer) -> Layer:
    """Not yet compiled."""
    return replace(layer)


def side_by_side(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors as parts of one buffer, which holds NaN elsewhere."""
    starts = [0, *accumulate(len(tensor) + 5 for tensor in tensors)]
    buffer = torch.full((starts[-1] + 5, max(tensor.shape[1] for tensor in tensors) + 1, DIM), NAN)
    views = [buffer[at + 5 : at + 5 + len(tensor), 1 : 1 + tensor.shape[1]] for at, tensor in zip(starts, tensors)]
    return [view.copy_(tensor) for view, tensor in zip(views, tensors)]
