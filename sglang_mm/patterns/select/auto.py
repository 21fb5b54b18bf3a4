"""Selection without a plan: per unit the cheapest pattern that keeps enough of what its rows attend to.

Every candidate is measured on the probe of each modality of rows, as boundary q has it: from the prompt's last rows
alone nobody would know the recall of the video's rows. One pass of masses serves all candidates.
"""

import logging
from collections.abc import Sequence

from torch import Tensor

from sglang_mm.patterns.catalog import AShape, Blocks, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.patterns.select.draft import LARGEST_SHARE, THETA, Draft, Sets, patterns_of
from sglang_mm.patterns.select.held import Heads
from sglang_mm.patterns.select.peers import Peers
from sglang_mm.patterns.select.report import Report, Trial
from sglang_mm.types import Modality

CANDIDATES: tuple[Pattern, ...] = (AShape(), Grid(axis="frame"), Grid(axis="row"), VerticalSlash(), Blocks())
DENSE_LAYERS = 2
"""The first layers attend too evenly to be sparse (MMInference, section 2)."""
FIRST_LAYER = "dense: one of the first layers"
NOT_CHEAPER = f"dense: no candidate computes less than {LARGEST_SHARE:g} of the pairs"


def auto_select(
    units: Sequence[Heads],
    layer: int,
    q_THD: Tensor,
    k_KGD: Tensor,
    rows: Shard,
    keys: Shard,
    *,
    scale: float,
    theta: float = THETA,
    peers: Peers | None = None,
    chunk: range | None = None,
    previous: ClassMasses | None = None,
    candidates: Sequence[Pattern] = CANDIDATES,
) -> tuple[Selection, Report]:
    """As `select`, with the cheapest candidate whose recall is theta or more, else dense; ties take the earlier.

    units: query heads that share a selection, of one K/V group each. layer: from 0; the first two are dense.
    """
    share = {"scale": scale, "theta": theta, "peers": peers, "chunk": chunk, "previous": previous}
    draft = Draft(units, q_THD, k_KGD, rows, keys, **share)
    for modality in keys.tokens.modalities:
        if layer < DENSE_LAYERS:
            for unit in range(len(units)):
                draft.keep_dense(unit, modality, reason=FIRST_LAYER)
        else:
            _decide(draft, modality, _of_use(candidates, keys))
    return draft.finish(f"selection of layer {layer}", logging.INFO)


def _of_use(candidates: Sequence[Pattern], keys: Shard) -> list[Pattern]:
    """Grids need media."""
    return [each for each in candidates if keys.tokens.grids or not isinstance(each, Grid)]


def _decide(draft: Draft, rows: Modality, candidates: Sequence[Pattern]) -> None:
    units = range(len(draft.units))
    probe = draft.probe(rows, units)
    if probe is None:
        for unit in units:
            draft.skip(unit, rows)
        return
    asked = [(unit, ((None, candidate),)) for candidate in candidates for unit in units]
    sets = iter(draft.choose(probe, asked))
    trials: list[tuple[Trial, ...]] = [()] * len(units)
    passed: list[list[tuple[Sets, float]]] = [[] for _ in units]
    for _ in candidates:
        tried = {unit: next(sets) for unit in units}
        for unit, recall in draft.recalls(probe, tried).items():
            trials[unit] += (Trial(patterns_of(tried[unit]), recall),)
            if draft.is_enough(probe, unit, recall):
                passed[unit].append((tried[unit], recall))
    cost = iter(draft.shares([panels for each in passed for panels, _ in each]))
    for unit in units:
        costs = [next(cost) for _ in passed[unit]]
        if not costs:
            draft.keep_dense(unit, rows, trials[unit], draft.why_dense(probe, unit))
        elif min(costs) > LARGEST_SHARE:
            draft.keep_dense(unit, rows, trials[unit], NOT_CHEAPER)
        else:
            draft.keep(unit, *passed[unit][costs.index(min(costs))], trials[unit])
