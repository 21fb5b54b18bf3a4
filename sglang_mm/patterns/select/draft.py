"""A selection in the making: for one modality of rows after another, sets are chosen, recall is measured, panels kept.

Both kinds of selection, from a plan and without one, are loops around a draft. U units.
"""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Dense
from sglang_mm.patterns.chosen import Nothing, Panel, Selection, Unit
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.choose import ClassMasses, choose
from sglang_mm.patterns.select.cost import causal_pairs, shares
from sglang_mm.patterns.select.held import Heads, Held
from sglang_mm.patterns.select.masses import Want
from sglang_mm.patterns.select.peers import Alone, Peers
from sglang_mm.patterns.select.probe import Probe, take_probe
from sglang_mm.patterns.select.recall import measure_recall
from sglang_mm.patterns.select.report import Patterns, Report, Trial, Verdict
from sglang_mm.types import Modality

log = logging.getLogger(__name__)
THETA = 0.9
LARGEST_SHARE = 0.75
"""Of the causal pairs: what computes more is not worth its lists and tables where nobody asked for it."""
DENSE: Patterns = ((None, Dense()),)
Sets = tuple[Panel, ...]
"""Panels of one unit and one modality of rows."""


class Draft:
    """units: query heads of each; previous: running class masses of the chunk before.

    held's chunk is the whole prompt where none is given. Raises ConfigError for what does not fit.
    """

    def __init__(
        self,
        units: Sequence[Heads],
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
    ):
        chunk = range(len(keys.tokens)) if chunk is None else chunk
        if not 0 <= chunk.start < chunk.stop <= len(keys.tokens) or chunk.step != 1:
            raise ConfigError(f"chunk {chunk}", f"rows of a prompt of {len(keys.tokens)} tokens", "check the chunk")
        if not 0 < theta <= 1:
            raise ConfigError(f"theta {theta}", "0 < theta <= 1", "pass the lowest recall to accept")
        self.held = Held(q_THD, k_KGD, rows, keys, scale, Alone() if peers is None else peers, chunk)
        self.units, self.theta = units, theta
        self._class_masses = dict(previous or {})
        self._panels: list[Sets] = [()] * len(units)
        self._verdicts: list[tuple[int, Verdict]] = []

    def probe(self, rows: Modality | None, units: Sequence[int]) -> Probe | None:
        """None where the chunk has no such row, or no unit asks."""
        return take_probe(self.held, rows, [self.units[unit] for unit in units]) if units else None

    def choose(self, probe: Probe, asked: Sequence[tuple[int, Patterns]]) -> list[Sets]:
        """The sets for each (unit, patterns), from one pass of masses. A unit may occur several times."""
        numbers = sorted({unit for unit, _ in asked})
        wants = [Want(numbers.index(unit), keys, pattern) for unit, each in asked for keys, pattern in each]
        heads = [self.units[unit] for unit in numbers]
        chosen, class_masses = choose(self.held, probe, heads, wants, self._class_masses)
        self._class_masses.update(class_masses)
        panels = iter([Panel(probe.modality, want.keys, want.pattern, sets) for want, sets in zip(wants, chosen)])
        return [tuple(next(panels) for _ in each) for _, each in asked]

    def recalls(self, probe: Probe, sets: Mapping[int, Sets]) -> dict[int, float]:
        """Mean recall of each unit with these sets."""
        units = [Unit(self.units[unit], panels) for unit, panels in sets.items()]
        return dict(zip(sets, measure_recall(self.held, probe, units)))

    def shares(self, sets: Sequence[Sets]) -> list[float]:
        """Pairs computed over causal pairs, for sets of one panel each."""
        return shares(self.held, [panels[0] for panels in sets])

    def keep(self, unit: int, sets: Sets, recall: float, trials: tuple[Trial, ...] = (), reason: str = "") -> None:
        kept = patterns_of(sets)
        self._panels[unit] += sets
        self._verdicts.append((unit, Verdict(self.units[unit], sets[0].rows, kept, recall, trials, reason)))

    def keep_dense(
        self, unit: int, rows: Modality | None, trials: tuple[Trial, ...] = (), reason: str = "", keys: Patterns = DENSE
    ) -> None:
        self.keep(unit, tuple(Panel(rows, each, Dense(), Nothing()) for each, _ in keys), 1.0, trials, reason)

    def skip(self, unit: int, rows: Modality | None) -> None:
        """The chunk has no such row: a panel, so that the unit is whole, and no verdict."""
        self._panels[unit] += (Panel(rows, None, Dense(), Nothing()),)

    def finish(self, title: str, level_of_fallbacks: int) -> tuple[Selection, Report]:
        """Logs one line."""
        units = tuple(Unit(heads, panels) for heads, panels in zip(self.units, self._panels))
        verdicts = [verdict for _, verdict in sorted(self._verdicts, key=lambda each: each[0])]
        report = Report(tuple(verdicts), self._densities(), self._class_masses)
        log.log(level_of_fallbacks if report.fallbacks else logging.INFO, "%s: %s", title, report.summary())
        return Selection(units, self.held.group), report

    def _densities(self) -> tuple[float, ...]:
        share_of = iter(shares(self.held, [panel for panels in self._panels for panel in panels]))
        causal = len(self.held.tokens) * (len(self.held.tokens) + 1) // 2
        computed = [sum(next(share_of) * causal_pairs(self.held, each) for each in panels) for panels in self._panels]
        return tuple(pairs / causal for pairs in computed)


def patterns_of(sets: Sets) -> Patterns:
    return tuple((panel.keys, panel.pattern) for panel in sets)


def is_dense(patterns: Patterns) -> bool:
    return all(isinstance(pattern, Dense) for _, pattern in patterns)
