"""The progress of one prefill on one rank, told while it runs: start, stages, layers, end. It sets this rank's vitals.

Kernels on a GPU run long after the host asked for them. A layer therefore may come with a question, `reached`, which a
thread asks until it says yes; the host goes on at once.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sglang_mm.events.messages import LayerDone, PrefillEnded, PrefillStarted, StageDone, StageStarted
from sglang_mm.events.publishing import Publisher, publisher
from sglang_mm.events.vitals import Vitals
from sglang_mm.events.vitals import vitals as own_vitals
from sglang_mm.events.wire import LAYERS_EVERY_S

_count = itertools.count()


class Progress:
    """Use in a `with`: entering tells the start, leaving the end, also of a prefill that raised.

    All ranks make one for the same batches in the same order, so that their numbers, and with them their ids, agree.
    new_tokens, cached_tokens, tokens (new ones by modality): of the whole batch. records: set before leaving.
    """

    def __init__(
        self,
        *,
        requests: list[str],
        rank: int,
        layers: int,
        to: Publisher | None = None,
        vitals: Vitals = own_vitals,
        **about,
    ):
        """about: the other fields of PrefillStarted (ranks, new_tokens, cached_tokens, schedule, tokens, chunk)."""
        self.vitals = vitals
        self.publisher = publisher() if to is None else to
        self.prefill, self.rank, self.layers = f"{next(_count)}:{requests[0] if requests else ''}", rank, layers
        self.records: dict[str, dict] = {}
        self._about = {"requests": requests, **about}
        self._waiting: deque[tuple[int, Callable[[], bool]]] = deque()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._start = time.monotonic()
        self.vitals.layer, self.vitals.layers, self.vitals.stage = -1, self.layers, "starting"
        started = {"prefill": self.prefill, "rank": self.rank, "layers": self.layers, "at": time.time()}
        self.publisher.emit(PrefillStarted(**started, **self._about))
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._ended.set()
        if self._watcher:
            self._watcher.join(1)
        told = f"{kind.__name__}: {error}"[:500] if kind else ""
        self._emit(PrefillEnded, records=self.records, error=told)
        if not kind:  # else it is still to be told where this rank failed
            self.vitals.rested()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """name: one of messages.STAGES."""
        start = self._seconds()
        self.vitals.layer, self.vitals.stage = (0 if name == "layers" else -1), name
        self._emit(StageStarted, stage=name)
        yield
        self.vitals.layer = -1
        self._emit(StageDone, stage=name, took=self._seconds() - start)

    def layer_done(self, layer: int, reached: Callable[[], bool] | None = None) -> None:
        """layer: from 0. reached: whether the device has come so far, as torch.cuda.Event.query; None: it has."""
        if reached is None or not self.publisher.on:
            self._done(layer)
            return
        self._waiting.append((layer, reached))
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="sglang_mm progress", daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(LAYERS_EVERY_S):
            self._tell_reached()
        self._tell_reached()

    def _tell_reached(self) -> None:
        newest = None
        while self._waiting and self._waiting[0][1]():
            newest, _ = self._waiting.popleft()
        if newest is not None:
            self._done(newest)

    def _done(self, layer: int) -> None:
        if self.vitals.stage == "layers":  # the watcher may come after the stage's end
            self.vitals.layer = min(layer + 1, self.layers - 1)
        self._emit(LayerDone, layer=layer, layers=self.layers)

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _emit(self, message: type, **fields) -> None:
        if self.publisher.on:
            self.publisher.emit(message(prefill=self.prefill, rank=self.rank, seconds=self._seconds(), **fields))
