"""What every step is given, and what steps tell those that follow."""

from dataclasses import dataclass, field

import torch

from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.sizes import Point, Sizes
from benchmarks.gpu_suite.timing import Timing
from benchmarks.gpu_suite.work import attention_flops, dense_pairs

ASSUMED_RATE = 3e14
"""Operations per second of attention on a device of which nothing is measured: an A100 with a good kernel has half."""


@dataclass
class Suite:
    """green: names of backends whose every check passed; only these are timed.

    dense: per point, the best dense baseline and its time. speeds: seconds by (backend, point), one of each density.
    ceilings: bytes or operations per second, by name.
    """

    device: torch.device
    sizes: Sizes
    budget: Budget
    report: Report
    green: tuple[str, ...] = ()
    dense: dict[Point, tuple[str, Timing]] = field(default_factory=dict)
    speeds: dict[tuple[str, Point], list[float]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type != "cuda"

    @property
    def timed(self) -> tuple[str, ...]:
        """Green backends; without the reference, which is no kernel, unless there is nothing else to rehearse with."""
        return tuple(name for name in self.green if self.is_rehearsal or name != "reference")

    @property
    def fastest(self) -> str | None:
        """The green backend that was fastest at the longest prompt that any was timed at; else the first one.

        One that was timed at fewer densities than another there is not the fastest.
        """
        if not self.speeds:
            return next(iter(self.timed), None)
        longest = max((point for _, point in self.speeds), key=lambda point: (point.tokens, point.heads))
        there = {name: seconds for (name, point), seconds in self.speeds.items() if point == longest}
        return min(there, key=lambda name: (-len(there[name]), sum(there[name])))

    def best_dense(self, point: Point) -> str | None:
        """The dense baseline that was best at the longest of the lengths up to the point's; else at any."""
        known = sorted(self.dense, key=lambda each: (each.tokens > point.tokens, -each.tokens))
        return self.dense[known[0]][0] if known else None

    def expected(self, point: Point, share: float = 1.0) -> float:
        """About how many seconds attention of one layer will take, from what was measured so far."""
        pairs = dense_pairs(point.tokens, point.heads)
        rates = [
            attention_flops(dense_pairs(each.tokens, each.heads), self.sizes.head_dim) / timing.median
            for each, (_, timing) in self.dense.items()
        ]
        seconds = attention_flops(pairs, self.sizes.head_dim) / (max(rates) if rates else ASSUMED_RATE)
        return seconds * min(1.0, 2 * share + 0.02)

    def note_speed(self, backend: str, point: Point, seconds: float) -> None:
        self.speeds.setdefault((backend, point), []).append(seconds)

    def free(self) -> None:
        """Give memory of the last size back, before the next one is made."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
