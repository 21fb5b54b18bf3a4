"""Any prompt, boundary, pattern and sets: what is read is what was written."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.chosen import BlockSet, Selection, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, load, save
from tests.patterns.strategies import maps, units

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(deadline=None, max_examples=40)
@given(st.data(), maps)
def test_sets_come_back_as_they_were(data, tokens):
    layers = []
    for number in range(2):
        drawn = tuple(Unit((head,), data.draw(units(tokens)).panels) for head in range(2))
        layers.append(KeptLayer(number, Selection(drawn, 2), (), (1.0, 1.0)))
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptRequest("r", tokens, (range(len(tokens)),), 2, "auto", (tuple(layers),))
        found = load(save(Path(folder) / "r.npz", kept))
    for layer, like in zip(found.layers[0], layers, strict=True):
        assert layer.selection.digest() == like.selection.digest()
        for unit, expected in zip(layer.selection.units, like.selection.units, strict=True):
            for panel, other in zip(unit.panels, expected.panels, strict=True):
                assert (panel.rows, panel.keys, panel.pattern) == (other.rows, other.keys, other.pattern)
                if isinstance(panel.chosen, BlockSet):
                    assert all(
                        torch.equal(one, two)
                        for one, two in zip(vars(panel.chosen).values(), vars(other.chosen).values())
                    )
            assert torch.equal(unit_mask(unit, found.tokens), unit_mask(expected, tokens))
