"""Time of device work: the median of several runs after a warm-up, and how far they spread.

On CUDA between two events. The device is idle when a run starts, so that what the host needs to prepare and to wait is
in the time. Caches are warm: inputs of 32K tokens and more are larger than the L2 of an H200 (60 MB). Clocks are up: a
device that had nothing to do runs at a fraction of its speed, for some ten milliseconds of work.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MOST_RUNS = 30
FEW_RUNS = 3
LONG_S = 2.0
"""A run that takes this long is run once more after the warm-up, and that is all."""
WARM_S = 0.1
"""Of work before the runs that count."""


@dataclass(frozen=True)
class Timing:
    """Seconds: median, fastest and slowest of n runs."""

    median: float
    low: float
    high: float
    n: int

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def measure(
    run: Callable[[], object], device: torch.device, seconds: float = 0.5, before: float | None = None
) -> Timing:
    """Warm up, then run for about `seconds`, FEW_RUNS to MOST_RUNS times.

    before: seconds of a run that has just been, and counts as the first one of the warm-up.
    """
    warm = [once(run, device) if before is None else before]
    while sum(warm) < min(WARM_S, seconds) and len(warm) < MOST_RUNS:
        warm.append(once(run, device))
    times = [once(run, device)]
    is_long = min(*warm, *times) > LONG_S
    while not is_long and (len(times) < FEW_RUNS or (sum(times) < seconds and len(times) < MOST_RUNS)):
        times.append(once(run, device))
    return summary(times)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def summary(times: list[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def kernel_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds of one run that the device spends in kernels that are not PyTorch's own. None where nobody can tell.

    PyTorch's own make tables and copies; what is left are the attention kernels and the merges of their parts. Two runs
    are recorded and the second counts: the device idles while the recorder starts.
    """
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(2):
                run()
            torch.cuda.synchronize(device)
        on_device = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    except Exception:  # any, and by what is missing: without CUPTI it is an AssertionError
        return None
    spans = sorted(
        (event.time_range for event in on_device if not _is_pytorchs(event.name)), key=lambda span: span.start
    )
    return sum(span.elapsed_us() for span in spans[len(spans) // 2 :]) / 1e6 or None


def _is_pytorchs(kernel: str) -> bool:
    parts = (
        "at::",
        "at_cuda_detail",
        "cub::",
        "thrust",
        "anonymous namespace",
        "Memcpy",
        "Memset",
        "compute_cuda_kernel",
    )
    return any(part in kernel for part in parts)
