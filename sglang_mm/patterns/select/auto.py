"""Selection without a plan: per unit the cheapest pattern that keeps enough of what its rows attend to.

Every candidate is measured on the probe of each modality of rows, as boundary q has it: from the prompt's last rows
alone nobody would know the recall of the video's rows. One pass of masses serves all candidates.
"""

import logging
from collections.abc import Sequence

from torch import Tensor

from sglang_mm.patterns.catalog import AShape, Blocks, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.density import causal_pairs
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.patterns.select.draft import LARGEST_SHARE, THETA, Draft, Sets, patterns_of
from sglang_mm.patterns.select.held import Heads, Held
from sglang_mm.patterns.select.peers import Peers
from sglang_mm.patterns.select.report import Report, Trial
from sglang_mm.types import Modality

FULL_LENGTH = 1 << 16
"""Tokens from which on candidates have their full sizes."""
DENSE_LAYERS = 2
"""The first layers attend too evenly to be sparse (MMInference, section 2)."""
FIRST_LAYER = "dense: one of the first layers"
FEWEST_PAIRS = 0.02
"""Of the causal pairs of a chunk: rows that compute less are dense without a look, which would cost more."""
FEW_PAIRS = f"dense: rows of less than {FEWEST_PAIRS:g} of the pairs"
RULES = (FIRST_LAYER, FEW_PAIRS)
"""Reasons that no recall and no cost had a part in: what they name did not fall back."""
NOT_CHEAPER = f"dense: no candidate computes less than {LARGEST_SHARE:g} of the pairs"


def candidates_for(tokens: int) -> tuple[Pattern, ...]:
    """What is tried for a prompt of so many tokens, 1 or more: from FULL_LENGTH on always the same.

    | candidate | 4,096 tokens | 8,192 | 65,536 and more |
    |---|---|---|---|
    | a_shape, near: sink, window | 16, 128 | 16, 128 | 64, 1024 |
    | a_shape, far: sink, window | 16, 256 | 16, 512 | 128, 4096 |
    | grid by frame, by row; lines of a class, of a class difference: sink, window | 16, 128 | 16, 128 | 64, 1024 |
    | vertical_slash, few columns: columns, slash | 128, 128 | 128, 256 | 1000, 2048 |
    | vertical_slash, many columns: columns, slash | 256, 128 | 512, 256 | 4000, 2048 |
    | blocks: threshold | 0.95 | 0.95 | 0.95 |

    Full sizes are the patterns' own, made for 64K tokens and more; a prompt of 6,000 tokens lies within their windows.
    Shorter ones have the same share of the prompt, in whole tiles of 128 keys (sinks: 16), at least one: a smaller
    window or list costs a kernel no less. The near a_shape is what a grid shows besides lines, so that a head
    that needs no lines never takes a grid whose class nothing but rounding chose. Class masses are handed from chunk to
    chunk by pattern: the length is the whole prompt's, not the chunk's.
    """

    def shrunk(size: int, step: int = 128) -> int:
        return min(size, -(-size * tokens // (FULL_LENGTH * step)) * step)

    near = {"sink": shrunk(64, 16), "window": shrunk(1024)}
    few = {"slash": shrunk(2048), "sink": shrunk(32, 16), "window": 128}
    found = (
        AShape(**near),
        AShape(sink=shrunk(128, 16), window=shrunk(4096)),
        *(Grid(axis=axis, **near) for axis in ("frame", "row")),
        *(Grid(axis=axis, vertical=False, slash=1, **near) for axis in ("frame", "row")),
        VerticalSlash(vertical=shrunk(1000), **few),
        VerticalSlash(vertical=shrunk(4000), **few),
        Blocks(),
    )
    return tuple(dict.fromkeys(found))


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
    candidates: Sequence[Pattern] | None = None,
) -> tuple[Selection, Report]:
    """As `select`, with the cheapest candidate whose recall is theta or more, else dense; ties take the earlier.

    units: query heads that share a selection, of one K/V group each. layer: from 0; the first two are dense, and
    so are rows of next to no cost, as of a question behind a long video.
    candidates: those for the prompt's length by default.
    """
    candidates = candidates_for(len(keys.tokens)) if candidates is None else candidates
    share = {"scale": scale, "theta": theta, "peers": peers, "chunk": chunk, "previous": previous}
    draft = Draft(units, q_THD, k_KGD, rows, keys, **share)
    for modality in keys.tokens.modalities:
        rule = _rule(draft.held, layer, modality)
        if rule:
            for unit in range(len(units)):
                draft.keep_dense(unit, modality, reason=rule)
        else:
            _decide(draft, modality, _of_use(candidates, keys))
    return draft.finish(f"selection of layer {layer}", logging.INFO)


def _rule(held: Held, layer: int, rows: Modality) -> str:
    """Why these rows are dense without a look; empty where they are looked at."""
    if layer < DENSE_LAYERS:
        return FIRST_LAYER
    own, all_rows = (causal_pairs(held.tokens, modality, within=held.chunk) for modality in (rows, None))
    return FEW_PAIRS if 0 < own < FEWEST_PAIRS * all_rows else ""


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
    asked = [(unit, ((None, candidate),)) for unit in units for candidate in candidates]
    waiting = _cheapest_first(draft, units, list(zip(asked, draft.choose(probe, asked))))
    for unit in units:
        if not waiting[unit]:
            draft.keep_dense(unit, rows, reason=NOT_CHEAPER)
    trials: list[tuple[Trial, ...]] = [()] * len(units)
    while tried := {unit: left.pop(0) for unit, left in enumerate(waiting) if left}:
        for unit, recall in draft.recalls(probe, tried).items():
            trials[unit] += (Trial(patterns_of(tried[unit]), recall),)
            if draft.is_enough(probe, unit, recall):
                draft.keep(unit, tried[unit], recall, trials[unit])
                waiting[unit].clear()
            elif not waiting[unit]:
                draft.keep_dense(unit, rows, trials[unit], draft.why_dense(probe, unit))


def _cheapest_first(draft: Draft, units: Sequence[int], found: Sequence[tuple[tuple, Sets]]) -> list[list[Sets]]:
    """Per unit the sets that are worth a trial: a recall is measured only where no cheaper set had enough."""
    costs = draft.shares([sets for _, sets in found])
    worth = [(cost, unit, sets) for cost, ((unit, _), sets) in zip(costs, found) if cost <= LARGEST_SHARE]
    worth.sort(key=lambda each: each[0])  # stable: ties take the earlier
    return [[sets for _, of, sets in worth if of == unit] for unit in units]
