"""A selection in the making: for one modality of rows after another, sets are chosen, recall is measured, panels kept.

Both kinds of selection, from a plan and without one, are loops around a draft. U units.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan

from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Dense
from sglang_mm.patterns.chosen import Nothing, Panel, Selection, Unit
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.agree import check_agreement
from sglang_mm.patterns.select.choose import ClassMasses, choose
from sglang_mm.patterns.select.cost import densities, pairs_in_blocks, share
from sglang_mm.patterns.select.held import Heads, Held, check_units
from sglang_mm.patterns.select.masses import Want
from sglang_mm.patterns.select.peers import Alone, Peers
from sglang_mm.patterns.select.probe import Probe, take_probe
from sglang_mm.patterns.select.recall import measure_recall, rounding
from sglang_mm.patterns.select.report import Patterns, Report, Trial, Verdict
from sglang_mm.types import Modality

log = logging.getLogger(__name__)
THETA = 0.9
LARGEST_SHARE = 0.75
"""Of the causal pairs: what computes more is not worth its lists and tables where nobody asked for it."""
NOT_A_NUMBER = "dense: recall is not a number"
"""Infinite or undefined scores: no pattern would have a recall."""
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
        check_units(units, self.held)
        self.units, self.theta = units, theta
        self._class_masses = dict(previous or {})
        self._panels: list[Sets] = [()] * len(units)
        self._verdicts: list[tuple[int, Verdict]] = []
        self._in_blocks: dict[Panel, int] = {}

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

    def is_enough(self, probe: Probe, unit: int, recall: float) -> bool:
        """Theta or more, up to rounding; never where scores are infinite or no numbers."""
        return recall >= self.theta - rounding(probe, self.units[unit])

    def why_dense(self, probe: Probe, unit: int) -> str:
        """The reason of rows whose recall is not enough."""
        return f"dense: recall below {self.theta:g}" if self.is_number(probe, unit) else NOT_A_NUMBER

    def is_number(self, probe: Probe, unit: int) -> bool:
        """Whether the unit's recalls are: its scores are finite."""
        return not isnan(rounding(probe, self.units[unit]))

    def shares(self, sets: Sequence[Sets]) -> list[float]:
        """Pairs computed over causal pairs of the chunk's rows, for sets of one panel each."""
        self._count_blocks([panels[0] for panels in sets])
        return [share(self.held, panels[0], self._in_blocks) for panels in sets]

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
        """Compares the selection with that of all other ranks, and logs one line. Raises RankMismatch."""
        units = tuple(Unit(heads, panels) for heads, panels in zip(self.units, self._panels))
        verdicts = [verdict for _, verdict in sorted(self._verdicts, key=lambda each: each[0])]
        selection = Selection(units, self.held.group)
        check_agreement(self.held, selection)
        kept = [panel for panels in self._panels for panel in panels]
        self._count_blocks(kept)
        in_blocks = {panel: self._in_blocks[panel] for panel in kept if panel in self._in_blocks}
        count = partial(densities, self.held.tokens, self.held.chunk, self._panels, in_blocks)
        report = Report(tuple(verdicts), count, self._class_masses)
        log.log(level_of_fallbacks if report.fallbacks else logging.INFO, "%s: %s", title, report.summary())
        return selection, report

    def _count_blocks(self, panels: Sequence[Panel]) -> None:
        """Now, while all ranks are here: whoever asks for densities later asks alone."""
        unknown = [panel for panel in panels if panel not in self._in_blocks]
        self._in_blocks.update(pairs_in_blocks(self.held, unknown))


def patterns_of(sets: Sets) -> Patterns:
    return tuple((panel.keys, panel.pattern) for panel in sets)


def is_dense(patterns: Patterns) -> bool:
    return all(isinstance(pattern, Dense) for _, pattern in patterns)
