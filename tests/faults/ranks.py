"""What a rank does in one case: join a ring, prove that it works, compute a stack of layers with a fault in it.

Runs in the processes of the pool. Times are time.monotonic(), which all processes of a machine share.
"""

import gc
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_mm.errors import RankMismatch, RingBroken
from sglang_mm.events.naming import named
from sglang_mm.events.progress import Progress
from sglang_mm.events.publishing import publisher
from sglang_mm.events.vitals import vitals
from sglang_mm.parallel.distributed import DistributedTransport
from sglang_mm.parallel.waiting import EDGES_S
from tests.faults.pool import tell
from tests.faults.stack import LAYERS, expected, last_rows, run_layer

DEADLINE_S = 1.5  # of every wait in a ring that is to break
JOIN_S = 20.0
PACE_S = 0.4  # of the layers together in which one rank takes three times as long: far above what a busy machine adds
PREFILLS_TO_TELL = 4  # that a rank is slow: three in a row, and one that something else may disturb
MOMENTS = {"first layer": 0, "middle layer": LAYERS // 2, "last layer": LAYERS - 1}
DIGEST = 0x5EED


@dataclass(frozen=True)
class Case:
    """fault: of STRIKES, `3x slow` or `wrong digest`; moment: of MOMENTS; culprit: the rank that it strikes."""

    fault: str
    moment: str
    schedule: str
    culprit: int

    @property
    def layer(self) -> int:
        return MOMENTS[self.moment]


@dataclass
class Report:
    """What one rank saw. error: its type, or empty; saw, stage, cause: of the error as the transport raised it;
    named, layer, text: after the hub was asked. raised_at, named_at: when. before, after: footprints."""

    error: str = ""
    saw: int | None = None
    stage: str = ""
    cause: str = ""
    named: int | None = None
    layer: int | None = None
    text: str = ""
    raised_at: float = 0.0
    named_at: float = 0.0
    worst: float = 0.0
    layers_done: int = 0
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)


def prepare(rank: int, ranks: int, environment: dict[str, str]) -> None:
    """Once per process: heartbeats, and whatever is made on first use."""
    os.environ.update(environment)
    vitals.start(rank)
    publisher()
    for layer in range(LAYERS):
        expected(layer, ranks, rank)
    gc.collect()
    gc.freeze()  # counting objects takes most of a second where all of torch's are among them
    footprint()


def run_case(case: Case, rank: int, ranks: int, rendezvous: str) -> Report:
    """One case on one rank, from joining to tearing down."""
    report = Report(before=footprint())
    _run(case, rank, ranks, rendezvous, report)
    report.after = _settled_footprint(report.before)
    return report


@contextmanager
def joined(rank: int, ranks: int, rendezvous: str, deadline_s: float) -> Iterator[DistributedTransport]:
    """A ring over all processes of the pool, torn down in the end."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=JOIN_S),
    )
    transport = DistributedTransport(dist.group.WORLD, range(ranks), "cpu", deadline_s)
    vitals.follow(lambda: transport.waits.now, transport.waits.take, EDGES_S)
    try:
        yield transport
    finally:
        transport.close()
        vitals.rested()


def _run(case: Case, rank: int, ranks: int, rendezvous: str, report: Report) -> None:
    with joined(rank, ranks, rendezvous, JOIN_S) as transport:
        try:
            report.worst = run_layer(0, case.schedule, transport, lambda: None, DIGEST)  # a ring that works
            transport.deadline_s = DEADLINE_S
            for prefill in range(PREFILLS_TO_TELL if case.fault == "3x slow" else 1):
                _prefill(case, f"{case.fault} {prefill}", transport, report)
        except Exception as error:
            _note(error, report)


def _prefill(case: Case, request: str, transport: DistributedTransport, report: Report) -> None:
    began = time.monotonic()
    transport.meter.take()
    about = {"ranks": transport.size, "new_tokens": 157, "cached_tokens": 290, "schedule": case.schedule}
    with Progress(requests=[request], rank=transport.rank, layers=LAYERS, **about) as progress:
        with progress.stage("layers"):
            for layer in range(LAYERS):
                fault = Fault(case, transport.rank, layer)
                error = run_layer(layer, case.schedule, transport, fault.strike, fault.digest)
                report.worst, report.layers_done = max(report.worst, error), layer + 1
                progress.layer_done(layer)
        with progress.stage("logits"):
            last_rows(transport)
        waited_s = sum(traffic.host_waited_s for traffic in transport.meter.take().values())
        progress.records = {request: {"seconds": _measured(waited_s, time.monotonic() - began, transport)}}


def _measured(waited_s: float, total_s: float, transport: DistributedTransport) -> dict[str, list[float]]:
    """As records have it: a value per rank."""
    row = torch.tensor([[waited_s, total_s]], dtype=torch.float64)
    told = torch.cat(transport.all_to_all([row] * transport.size, [1] * transport.size, "measurements", host=True))
    return {"transport": told[:, 0].tolist(), "total": told[:, 1].tolist()}


def _note(error: Exception, report: Report) -> None:
    report.raised_at = time.monotonic()
    if isinstance(error, RingBroken):
        report.saw, report.stage, report.cause = error.rank, error.stage, error.cause
    told = named(error)
    report.named_at, report.error, report.text = time.monotonic(), type(told).__name__, str(told)
    if isinstance(told, RingBroken):
        report.named, report.layer = told.rank, told.layer
    elif isinstance(told, RankMismatch):
        report.stage = "check"


class Fault:
    """strike: called by every attention that starts; the fault is in the first one of the case's layer."""

    def __init__(self, case: Case, rank: int, layer: int):
        self.case, self.is_here = case, rank == case.culprit and layer == case.layer
        paced = case.fault == "3x slow" and layer >= case.layer
        self.seconds = (3 if rank == case.culprit else 1) * PACE_S / (LAYERS - case.layer) if paced else 0.0
        self._has_struck = False

    @property
    def digest(self) -> int:
        if self.case.fault == "wrong digest" and self.is_here:
            tell(time.monotonic())
            return DIGEST + 1
        return DIGEST

    def strike(self) -> None:
        if self._has_struck:
            return
        self._has_struck = True
        time.sleep(self.seconds)
        if self.is_here and self.case.fault in STRIKES:
            tell(time.monotonic())
            STRIKES[self.case.fault]()


def _fail() -> None:
    raise ArithmeticError("the kernel failed, as planned")


def _exhaust_memory() -> None:
    """The allocator's own failure, under a limit of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        torch.empty(1 << 30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


STRIKES = {
    "exit": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exception in a kernel": _fail,
    "out of memory": _exhaust_memory,
}
FAULTS = (*STRIKES, "3x slow", "wrong digest")


def footprint() -> dict[str, int]:
    """What this process holds: file descriptors, threads, tensors that were not there when it was prepared, MiB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() >> 20
    tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    counts = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
    return {**counts, "tensors": tensors, "MiB": resident}


def _settled_footprint(before: dict[str, int], within_s: float = 2.0) -> dict[str, int]:
    """Threads of a torn down group may take a moment to end."""
    end = time.monotonic() + within_s
    while (now := footprint())["threads"] > before["threads"] or now["descriptors"] > before["descriptors"]:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return now
