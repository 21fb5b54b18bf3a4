"""What every step is given, and what steps tell those that follow."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.sizes import Point, Sizes
from benchmarks.gpu_suite.timing import Timing
from benchmarks.gpu_suite.work import attention_flops, dense_pairs

ASSUMED_RATE = 3e14
"""Operations per second of attention on a device of which nothing is measured: an A100 with a good kernel has half."""


class DeviceLost(BaseException):
    """The device refuses all further work of this process, as it does after an illegal access.

    No Exception: whoever goes on with the next one after a failure must not go on after this.
    """


@dataclass
class Suite:
    """green: names of backends whose every check passed; only these are timed. baselines: dense ones that are right.

    dense: per point, the dense baselines that were timed. speeds: seconds by (backend, point), one of each density.
    ceilings: bytes or operations per second, by name. ladder: seconds of the dense model by tokens.
    at_work: the backend or baseline that runs now. lost: those that broke the device or hung, and are not run again.
    """

    device: torch.device
    sizes: Sizes
    budget: Budget
    report: Report
    green: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    dense: dict[Point, dict[str, Timing]] = field(default_factory=dict)
    speeds: dict[tuple[str, Point], list[float]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    ladder: dict[int, float] = field(default_factory=dict)
    at_work: str = ""
    lost: tuple[str, ...] = ()

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type != "cuda"

    @property
    def timed(self) -> tuple[str, ...]:
        """Green backends; without the reference, which is no kernel, unless there is nothing else to rehearse with."""
        green = tuple(name for name in self.green if name not in self.lost)
        kernels = tuple(name for name in green if name != "reference")
        return kernels or (green if self.is_rehearsal else ())

    @property
    def fastest(self) -> str | None:
        """The timed backend that was fastest at the longest prompt that any was timed at; else the first one.

        One that was timed at fewer densities than another there is not the fastest.
        """
        speeds = {key: seconds for key, seconds in self.speeds.items() if key[0] not in self.lost}
        if not speeds:
            return next(iter(self.timed), None)
        longest = max((point for _, point in speeds), key=lambda point: (point.tokens, point.heads))
        there = {name: seconds for (name, point), seconds in speeds.items() if point == longest}
        return min(there, key=lambda name: (-len(there[name]), sum(there[name])))

    def by_speed(self, point: Point) -> list[str]:
        """Dense baselines that are right: first those timed at the longest of the lengths up to the point's, else at
        any, by their times there; then the others."""
        known = sorted(self.dense, key=lambda each: (each.tokens > point.tokens, -each.tokens))
        times = self.dense[known[0]] if known else {}
        order = [*sorted(times, key=lambda name: times[name].median), *self.baselines]
        return [name for name in dict.fromkeys(order) if name not in self.lost]

    def best_dense(self, point: Point) -> tuple[str, Timing] | None:
        """The fastest baseline of this very point."""
        times = self.dense.get(point)
        return min(times.items(), key=lambda each: each[1].median) if times else None

    def expected(self, point: Point, share: float = 1.0) -> float:
        """About how many seconds attention of one layer will take, from what was measured so far."""
        pairs = dense_pairs(point.tokens, point.heads)
        rates = [
            attention_flops(dense_pairs(each.tokens, each.heads), self.sizes.head_dim) / timing.median
            for each, timings in self.dense.items()
            for timing in timings.values()
        ]
        seconds = attention_flops(pairs, self.sizes.head_dim) / (max(rates) if rates else ASSUMED_RATE)
        return seconds * min(1.0, 2 * share + 0.02)

    def note_speed(self, backend: str, point: Point, seconds: float) -> None:
        self.speeds.setdefault((backend, point), []).append(seconds)

    @contextmanager
    def trying(self, name: str, what: str | None = None) -> Iterator[None]:
        """Whatever happens to the device meanwhile is put down to this backend or baseline. Raises DeviceLost.

        what: if given, other failures are reported as of this, and not raised: the others are still to be tried.
        """
        self.at_work = name
        self.report.tell()
        try:
            yield
        except Exception as error:
            self.check_device(error)
            self.at_work = ""
            if what is None:
                raise
            self.report.fail(what, error)
        self.at_work = ""

    def check_device(self, cause: Exception) -> None:
        """Raises DeviceLost if nothing can be run any more."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                raise DeviceLost(f"{type(cause).__name__}: {str(cause)[:400]}") from cause

    def free(self) -> None:
        """Give memory of the last size back, before the next one is made."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
