"""What the selection of one layer decided and why: recalls, fallbacks, densities; as data and as text."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from sglang_mm.patterns.catalog import Dense, Pattern
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.patterns.select.held import Heads
from sglang_mm.types import Modality

Patterns = tuple[tuple[Modality | None, Pattern], ...]
"""What one modality of rows does: a pattern per modality of keys (None: all keys)."""


@dataclass(frozen=True)
class Trial:
    """recall: with these patterns, on the probe's rows."""

    patterns: Patterns
    recall: float

    def __str__(self) -> str:
        return f"{name_patterns(self.patterns)} {self.recall:.4f}"


@dataclass(frozen=True)
class Verdict:
    """What the rows of one modality (None: all) of one unit do. trials: what was measured, in order.

    recall: of what was kept; 1 where that is dense. reason: why it is not what was asked for; empty where it is.
    """

    heads: Heads
    rows: Modality | None
    kept: Patterns
    recall: float
    trials: tuple[Trial, ...] = ()
    reason: str = ""

    @property
    def is_sparse(self) -> bool:
        return not all(isinstance(pattern, Dense) for _, pattern in self.kept)

    def __str__(self) -> str:
        heads = ",".join(map(str, self.heads))
        rows = "all rows" if self.rows is None else f"{self.rows.name.lower()} rows"
        text = f"heads {heads}, {rows}: {name_patterns(self.kept)}, recall {self.recall:.4f}"
        tried = f" (tried {'; '.join(map(str, self.trials))})" if self.trials else ""
        return text + (f"; {self.reason}" if self.reason else "") + tried


@dataclass(frozen=True)
class Report:
    """verdicts: every unit, every modality of rows.

    count_densities: what `densities` calls once. class_masses: to be passed on to the selection of the next chunk.
    """

    verdicts: tuple[Verdict, ...]
    count_densities: Callable[[], tuple[float, ...]] = field(repr=False, compare=False)
    class_masses: ClassMasses = field(default_factory=dict, repr=False)

    @cached_property
    def densities(self) -> tuple[float, ...]:
        """Per unit, pairs computed over causal pairs of the chunk's rows. Counted when first asked; no collective."""
        return self.count_densities()

    @property
    def fallbacks(self) -> Counter[str]:
        """How often each reason made rows dense, or blocks, that might have been something cheaper."""
        return Counter(verdict.reason for verdict in self.verdicts if verdict.reason)

    @property
    def lowest_recall(self) -> float:
        return min((verdict.recall for verdict in self.verdicts), default=1.0)

    def summary(self) -> str:
        sparse = sum(verdict.is_sparse for verdict in self.verdicts)
        reasons = "".join(f"; {count} x {reason}" for reason, count in sorted(self.fallbacks.items()))
        counts = f"{sparse} of {len(self.verdicts)} verdicts sparse"
        return f"{counts}, lowest recall {self.lowest_recall:.4f}{reasons}"

    def __str__(self) -> str:
        return "\n".join([self.summary(), *map(str, self.verdicts)])


def name_patterns(patterns: Patterns) -> str:
    """`grid`, or `grid to video + dense to text`."""
    named = [
        type(pattern).__struct_config__.tag + ("" if keys is None else f" to {keys.name.lower()}")
        for keys, pattern in patterns
    ]
    return " + ".join(named)
