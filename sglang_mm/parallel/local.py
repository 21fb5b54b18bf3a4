"""The ring inside one process: every rank is a thread, messages are tensors handed over in shared mailboxes.

For tests and for composing one rank's work on one device. On CUDA all threads use the device's default stream, so
what a rank reads has been computed.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sglang_mm.errors import RankMismatch, RingBroken
from sglang_mm.parallel.meter import Meter
from sglang_mm.parallel.nodes import Nodes
from sglang_mm.parallel.transport import Settle, Transport
from sglang_mm.parallel.waiting import Wait, Waits

Result = TypeVar("Result")


class Mailboxes:
    """What the threads share: messages by (source, destination, number), and who has failed."""

    def __init__(self):
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int, int], list[Tensor]] = {}
        self._failed: dict[int, BaseException] = {}

    def post(self, address: tuple[int, int, int], tensors: list[Tensor]) -> None:
        with self._changed:
            self._messages[address] = tensors
            self._changed.notify_all()

    def take(self, addresses: Sequence[tuple[int, int, int]], wait: Wait, deadline_s: float) -> list[list[Tensor]]:
        """The messages at all addresses. Raises RingBroken when a source has failed, or is silent for deadline_s."""

        def missing() -> list[int]:
            return [address[0] for address in addresses if address not in self._messages]

        with self._changed:
            self._changed.wait_for(lambda: self._failed.keys() & missing() or not missing(), deadline_s)
            silent = sorted(missing(), key=lambda source: source not in self._failed)
            if silent:
                cause, waited_s = str(self._failed.get(silent[0], "")), time.monotonic() - wait.since
                raise RingBroken(silent[0], wait.stage, waited_s, cause, silent=tuple(silent))
            return [self._messages.pop(address) for address in addresses]

    def fail(self, rank: int, error: BaseException) -> None:
        with self._changed:
            self._failed[rank] = error
            self._changed.notify_all()


class LocalTransport(Transport):
    """One thread's end of the mailboxes."""

    def __init__(
        self, rank: int, size: int, mailboxes: Mailboxes, deadline_s: float, device: str = "cpu", nodes: int = 1
    ):
        self.rank, self.ranks, self.deadline_s = rank, range(size), deadline_s
        self.nodes = Nodes(size, nodes).count
        self.device = torch.device(device)
        self.meter, self.waits = Meter(), Waits()
        self._mailboxes = mailboxes
        self._sent, self._expected = Counter(), Counter()

    def post(self, send: dict[int, list[Tensor]], receive: dict[int, list[Tensor]], stage: str) -> Settle:
        for destination, tensors in send.items():
            copies = [tensor.clone() for tensor in tensors]
            self._mailboxes.post((self.rank, destination, self._sent[destination]), copies)
            self._sent[destination] += 1
        awaited = []
        for source, buffers in receive.items():
            awaited.append(((source, self.rank, self._expected[source]), buffers))
            self._expected[source] += 1

        def settle(host: bool) -> None:
            if not awaited:
                return
            addresses = [address for address, _ in awaited]
            with self.waits.of([source for source, _, _ in addresses], stage) as wait:
                messages = self._mailboxes.take(addresses, wait, self.deadline_s)
            for (address, buffers), arrived in zip(awaited, messages, strict=True):
                self._fill(buffers, arrived, address[0], stage)

        return settle

    def _fill(self, buffers: list[Tensor], messages: list[Tensor], source: int, stage: str) -> None:
        expected, sent = ([tuple(tensor.shape) for tensor in tensors] for tensors in (buffers, messages))
        if expected != sent:
            raise RankMismatch(f"rank {self.rank} expected {expected} from rank {source} in {stage}, got {sent}")
        for buffer, message in zip(buffers, messages, strict=True):
            buffer.copy_(message)


def run_ranks(
    fn: Callable[[Transport], Result], ranks: int, *, deadline_s: float = 60.0, device: str = "cpu", nodes: int = 1
) -> list[Result]:
    """Run fn(transport) as `ranks` ranks in threads; their results in rank order. nodes: see Transport.

    Raises the error that came first, or RingBroken for a rank that has not returned when deadline_s and one second
    for the others to report have passed. A thread that never returns is abandoned, not waited for.
    """
    mailboxes, results, errors = Mailboxes(), [None] * ranks, []

    def run(rank: int) -> None:
        try:
            results[rank] = fn(LocalTransport(rank, ranks, mailboxes, deadline_s, device, nodes))
        except BaseException as error:
            errors.append(error)
            mailboxes.fail(rank, error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True, name=f"rank {rank}") for rank in range(ranks)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, began + deadline_s + 1 - time.monotonic()))
    if errors:
        raise errors[0]
    for rank, thread in enumerate(threads):
        if thread.is_alive():
            raise RingBroken(rank, "run_ranks", time.monotonic() - began)
    return results
