"""A meter of tensor memory: what one thread allocates inside a `with`, byte for byte, and who held it at the peak.

    with PeakMeter() as meter:
        with meter.phase("attention"):
            ...
    meter.peak.bytes, meter.peak.top(), meter.phases["attention"].bytes

Exact for tensors: it follows storages from the operator that made them until the last alias has gone. What a kernel
allocates for itself and frees again is not seen, nor is memory of other threads and other libraries. Storages that were
there before the `with` count nothing.
"""

import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf as INF
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TORCH = str(Path(torch.__file__).parent)
HIDDEN = (TORCH, __file__)  # frames that are nobody's call site


@dataclass
class Peak:
    """bytes: most that was alive at once. at: bytes by call site then. big: (shape, call site) of big float tensors."""

    bytes: int = 0
    at: dict[str, int] = field(default_factory=dict)
    big: set[tuple[tuple[int, ...], str]] = field(default_factory=set)

    def top(self, count: int = 10) -> list[tuple[str, int]]:
        """The call sites that held most, with their bytes."""
        return sorted(self.at.items(), key=lambda held: -held[1])[:count]


@dataclass(frozen=True)
class Allocation:
    """One storage. bytes: of all of it; shape, dtype: of the tensor it was made for; site: `file:line function`."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    site: str


class PeakMeter(TorchDispatchMode):
    """peak: of all of it; phases: of each phase by name, the largest where a name comes again. What was made before a
    phase and lives on counts in it. largest_floats: the largest storage of floats that was made.
    without: starts of call sites that count nothing, as `parallel/local.py`. big: elements from which floats are noted.
    """

    def __init__(self, without: tuple[str, ...] = (), big: float = INF):
        super().__init__()
        self.without, self.big = without, big
        self.live_bytes = 0
        self.peak = Peak()
        self.phases: dict[str, Peak] = {}
        self.largest_floats = Allocation(0, (), torch.float32, "nowhere")
        self._running = [self.peak]
        self._by_site: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref, Allocation | None]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        return result

    @contextmanager
    def phase(self, name: str):
        """What is alive in here has a peak of its own."""
        peak = self.phases.setdefault(name, Peak())
        self._running.append(peak)
        self._note()
        try:
            yield peak
        finally:
            self._running.remove(peak)

    def _meet(self, tensor: torch.Tensor) -> None:
        """An argument nobody was seen to make was there before, or came from another library: it counts nothing."""
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in self._known:
            self._remember(storage, None)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or not storage.nbytes():
            return
        made = Allocation(storage.nbytes(), tuple(tensor.shape), tensor.dtype, call_site())
        if made.site.startswith(self.without):
            self._remember(storage, None)
            return
        self._remember(storage, made)
        self.live_bytes += made.bytes
        self._by_site[made.site] += made.bytes
        if made.dtype.is_floating_point:
            self.largest_floats = max(self.largest_floats, made, key=lambda each: each.bytes)
            if made.bytes >= self.big * made.dtype.itemsize:
                for peak in self._running:
                    peak.big.add((made.shape, made.site))
        self._note()

    def _note(self) -> None:
        for peak in self._running:
            if self.live_bytes > peak.bytes:
                peak.bytes, peak.at = self.live_bytes, {site: held for site, held in self._by_site.items() if held}

    def _remember(self, storage, made: Allocation | None) -> None:
        key = storage._cdata

        def gone(_) -> None:
            self._known.pop(key, None)
            if made is not None:
                self.live_bytes -= made.bytes
                self._by_site[made.site] -= made.bytes

        self._known[key] = weakref.ref(storage, gone), made


def call_site() -> str:
    """`file:line function` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(HIDDEN):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
