"""What a rank waits for right now, and how long it has waited so far, by stage.

With gloo every wait for another rank holds the host and is seen here. With NCCL the device's stream waits instead: only
polls on the host are seen, those for values that the host is about to read.
"""

import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

EDGES_S = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper edges of a histogram's bins, in seconds; one more bin holds longer waits."""


@dataclass
class Wait:
    """peers: world ranks in the order in which they are waited for; came: of so many messages it is known that they
    ended; stage: as errors name it; since: time.monotonic()."""

    peers: Sequence[int]
    stage: str
    since: float
    came: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those still waited for. The first has not come; of the others nothing is known yet."""
        return tuple(dict.fromkeys(self.peers[self.came :]))


@dataclass
class StageWaits:
    """Ended waits of one stage. seconds: their sum; longest_s: the longest; bins: how many per bin of EDGES_S."""

    count: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0] * (len(EDGES_S) + 1))

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds
        self.longest_s = max(self.longest_s, seconds)
        self.bins[bisect_left(EDGES_S, seconds)] += 1


class Waits:
    """One rank's waits for others: `with waits.of(peers, stage) as wait: ...`. They do not nest.

    now: what is waited for, or None. One thread waits; any other may read `now` without a lock.
    """

    def __init__(self):
        self.now: Wait | None = None
        self._coming: Wait | None = None
        self._stages: dict[str, StageWaits] = {}

    def of(self, peers: Sequence[int], stage: str) -> "Waits":
        """peers: world ranks. Whatever runs inside the `with` is the wait, also when it raises."""
        self._coming = Wait(peers, stage, time.monotonic())
        return self

    def __enter__(self) -> Wait:
        self.now = self._coming
        return self.now

    def __exit__(self, *_) -> None:
        wait, self.now = self.now, None
        family = family_of(wait.stage)
        if family not in self._stages:
            self._stages[family] = StageWaits()
        self._stages[family].add(time.monotonic() - wait.since)

    def take(self) -> dict[str, StageWaits]:
        """Ended waits by stage, numbers of hops left out of its name; counting starts anew. For the waiting thread."""
        taken, self._stages = self._stages, {}
        return taken


@lru_cache(maxsize=4096)
def family_of(stage: str) -> str:
    """`ring hop 2 of 7` -> `ring hop`: what a histogram adds up."""
    return re.sub(r"( of)? \d+", "", stage)


def joined(taken: Iterable[Mapping[str, StageWaits]]) -> dict[str, StageWaits]:
    """The waits of several transports of one rank as one."""
    sums: dict[str, StageWaits] = {}
    for family, waits in (pair for stages in taken for pair in stages.items()):
        total = sums.setdefault(family, StageWaits())
        total.count += waits.count
        total.seconds += waits.seconds
        total.longest_s = max(total.longest_s, waits.longest_s)
        total.bins = [a + b for a, b in zip(total.bins, waits.bins)]
    return sums
