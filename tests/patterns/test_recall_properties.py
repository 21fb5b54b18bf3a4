"""Recall of any patterns and sets, measured by the compiled programs, is the mass that the oracle's mask shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.chosen import BlockSet, Panel, Unit
from sglang_mm.patterns.select.probe import take_probe
from sglang_mm.patterns.select.recall import measure_recall
from tests.patterns.naive import hold, probabilities, recall
from tests.patterns.strategies import maps, units

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


def with_all_row_blocks(unit: Unit, tokens: int) -> Unit:
    """Lists of blocks for every row: the probe's are among them."""
    every = torch.arange(-(-tokens // 128))
    panels = []
    for panel in unit.panels:
        chosen = panel.chosen
        if isinstance(chosen, BlockSet):
            lists = [torch.tensor([0, row]).unique() for row in every.tolist()]
            for n, row in enumerate(chosen.row_blocks.tolist()):
                lists[row] = chosen.key_blocks[chosen.ptr[n] : chosen.ptr[n + 1]]
            chosen = BlockSet(every, torch.tensor([0, *map(len, lists)]).cumsum(0), torch.cat(lists))
        panels.append(Panel(panel.rows, panel.keys, panel.pattern, chosen))
    return Unit((0, 1), tuple(panels))


@settings(deadline=None, max_examples=60)
@given(st.data(), maps)
def test_recall_is_the_masks_mass(data, tokens):
    unit = with_all_row_blocks(data.draw(units(tokens)), len(tokens))
    dtype, allowed = data.draw(st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6)]))
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(tokens), heads, 8, generator=draw, dtype=torch.float64).to(dtype) for heads in (2, 1))
    held = hold(q, k, tokens, 0.7)
    for modality in dict.fromkeys(panel.rows for panel in unit.panels):
        probe = take_probe(held, modality, [unit.heads])
        panels = tuple(panel for panel in unit.panels if panel.rows == modality)
        measured = measure_recall(held, probe, [Unit(unit.heads, panels)])
        p_HRS = probabilities(q, k, probe.rows, 0.7)
        assert abs(measured[0] - recall(p_HRS, probe.rows, unit, tokens)) <= allowed
