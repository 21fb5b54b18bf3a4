"""Seconds that the suite may take. What does not fit is skipped, and the report says so."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Budget:
    """seconds: from now on. skipped: (what, why) of all that did not fit."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self):
        self._start = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def allows(self, what: str, cost_s: float) -> bool:
        """Whether about cost_s seconds are left; if not, `what` is noted as skipped."""
        if cost_s <= self.left:
            return True
        self.skip(what, f"needs about {cost_s:.0f} s, {max(self.left, 0):.0f} s of {self.seconds:.0f} s are left")
        return False

    def skip(self, what: str, why: str) -> None:
        self.skipped.append((what, why))
