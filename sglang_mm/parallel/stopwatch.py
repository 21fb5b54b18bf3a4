"""Where the seconds of one rank go: named stages, measured on the device's stream where there is one."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Watch = Callable[[str], AbstractContextManager]
"""`with watch("attention"):` counts what runs inside towards that stage."""


def unwatched(stage: str) -> AbstractContextManager:
    """A watch that measures nothing."""
    return nullcontext()


class Stopwatch:
    """Sums the seconds of each stage: `with watch("attention"): ...`, then `watch.seconds()`.

    A stage inside another one stops the outer one meanwhile, so the sums never exceed what has passed.
    device: on CUDA a stage is the time of its work on the current stream, waits for other ranks included, and
    nothing waits before `seconds`; elsewhere it is the host's time. For one thread.
    """

    def __init__(self, device: torch.device | str):
        self._mark = _event if torch.device(device).type == "cuda" else time.perf_counter
        self._open: list[str] = []
        self._began = None
        self._stretches: list[tuple] = []
        self._sums: Counter[str] = Counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._turn()
        self._open.append(stage)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, of stages that have ended or been interrupted.

        On CUDA, waits for the last one, without a deadline: read it when the ranks' messages have been waited for.
        """
        stretches, self._stretches = self._stretches, []
        if stretches and not isinstance(stretches[-1][2], float):
            stretches[-1][2].synchronize()
        for stage, began, ended in stretches:
            self._sums[stage] += ended - began if isinstance(ended, float) else began.elapsed_time(ended) / 1000
        return dict(self._sums)

    def _turn(self) -> None:
        """The innermost stage ends here, or another one begins or goes on."""
        now = self._mark()
        if self._open:
            self._stretches.append((self._open[-1], self._began, now))
        self._began = now


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
