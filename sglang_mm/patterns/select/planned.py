"""From a plan to one layer's selection, online: take the probe, choose, measure recall, fall back where it is too low.

    patterns of the plan --choose--> sets --recall on the probe--> >= theta: kept
                                                              \\--> blocks --recall--> >= theta and cheap: kept
                                                                                  \\--> dense
Per unit and modality of rows. Nothing is sparse without a recall measured here. All ranks call alike and hold the same
selection; only lists of blocks are each rank's own.
"""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from sglang_mm.patterns.boundary import HeadPlan, panels
from sglang_mm.patterns.catalog import Blocks
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.patterns.select.draft import LARGEST_SHARE, THETA, Draft, Sets, is_dense, patterns_of
from sglang_mm.patterns.select.held import Heads
from sglang_mm.patterns.select.peers import Peers
from sglang_mm.patterns.select.report import Patterns, Report, Trial
from sglang_mm.types import Modality

FALLBACK: Patterns = ((None, Blocks()),)
TOO_LARGE = f"blocks would compute more than {LARGEST_SHARE:g} of the pairs"


def select(
    head_plans: Sequence[tuple[Heads, HeadPlan]],
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
    title: str = "selection",
) -> tuple[Selection, Report]:
    """The sets of one layer of one prompt, and what was measured (MMInference, Algorithms 1, 2 and 4).

    head_plans: (query heads of one K/V group, their plan) for each unit. q_THD [T, H, D], k_KGD [K, G, D]: this rank's
    rows and keys, fp16, bf16, fp32 or fp64; rows, keys: their positions. Over all ranks every row of the chunk and
    every key before its end occurs once. scale: of the scores, as in attention.
    theta: lowest mean recall with which rows stay sparse, up to rounding. chunk: rows computed now, all by default.
    previous: `class_masses` of the report on the chunk before. title: how the log line starts.
    Raises ConfigError for what does not fit, RankMismatch, on all ranks, where one chose otherwise. Logs a line, as a
    warning where recall made rows fall back.
    """
    share = {"scale": scale, "theta": theta, "peers": peers, "chunk": chunk, "previous": previous}
    draft = Draft([heads for heads, _ in head_plans], q_THD, k_KGD, rows, keys, **share)
    asked: dict[Modality | None, dict[int, Patterns]] = {}
    for unit, (_, plan) in enumerate(head_plans):
        for panel_rows, panel_keys, pattern in panels(plan, keys.tokens.modalities):
            of_rows = asked.setdefault(panel_rows, {})
            of_rows[unit] = (*of_rows.get(unit, ()), (panel_keys, pattern))
    for modality in (None, *Modality):
        _decide(draft, modality, asked.get(modality, {}))
    return draft.finish(title, logging.WARNING)


def _decide(draft: Draft, rows: Modality | None, asked: Mapping[int, Patterns]) -> None:
    """The panels of all units for the rows of one modality."""
    waiting = {unit: patterns for unit, patterns in asked.items() if not is_dense(patterns)}
    for unit in asked.keys() - waiting.keys():
        draft.keep_dense(unit, rows, keys=asked[unit])
    trials: dict[int, tuple[Trial, ...]] = dict.fromkeys(waiting, ())
    probe = draft.probe(rows, list(waiting))
    if probe is None:
        for unit in waiting:
            draft.skip(unit, rows)
        return
    below = f"recall below {draft.theta:g}"
    dense: dict[int, str] = {}
    for reason in ("", f"blocks: {below}"):
        sets = dict(zip(waiting, draft.choose(probe, list(waiting.items())))) if waiting else {}
        recalls = draft.recalls(probe, sets) if sets else {}
        enough = [unit for unit, recall in recalls.items() if draft.is_enough(probe, unit, recall)]
        too_large = _too_large(draft, {unit: sets[unit] for unit in enough}) if reason else ()
        for unit, recall in recalls.items():
            trials[unit] += (Trial(patterns_of(sets[unit]), recall),)
            if unit in too_large:
                dense[unit] = f"dense: {below}, and {TOO_LARGE}"
            elif unit in enough:
                draft.keep(unit, sets[unit], recall, trials[unit], reason)
            elif waiting[unit] == FALLBACK or not draft.is_number(probe, unit):
                dense[unit] = draft.why_dense(probe, unit)
        waiting = {unit: FALLBACK for unit in sets if unit not in enough and unit not in dense}
    for unit, why in dense.items():
        draft.keep_dense(unit, rows, trials[unit], why)


def _too_large(draft: Draft, sets: Mapping[int, Sets]) -> list[int]:
    return [unit for unit, share in zip(sets, draft.shares(list(sets.values()))) if share > LARGEST_SHARE]
