"""The ring over torch.distributed: gloo between CPU processes, NCCL between GPUs, point-to-point messages only.

gloo waits on the host and honours the deadline in each wait. NCCL waits on the device's stream, so the host runs
ahead; messages still under way past the deadline are noticed at the next exchange, or by whoever calls `raise_if_late`.
A ring that broke hangs up at once: closed connections are how ranks that wait for this one learn of it.
"""

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.parallel.meter import Meter
from sglang_mm.parallel.nodes import Nodes
from sglang_mm.parallel.transport import Settle, Transport
from sglang_mm.parallel.waiting import Wait, Waits

POLL_S = 0.0005
TEARDOWN_S = 0.5  # how long a rank is held by tearing down; what takes longer goes on in a thread
HANG_UP_TAG = 0x6D6D  # of a message that nobody sends


class DistributedTransport(Transport):
    """A ring over `group`.

    ranks: the world ranks of the group in ring order; a group of one needs no torch.distributed and may be None.
    device: cpu for gloo, this rank's GPU for NCCL (it must be the current device). Creating a NCCL ring is collective.
    A wait that raises RingBroken ends all connections of the group; from then on every exchange raises it.
    nodes: see Transport. Raises ConfigError when it does not divide the ring.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        device: torch.device | str,
        deadline_s: float,
        nodes: int = 1,
    ):
        self.group, self.ranks, self.device, self.deadline_s = group, tuple(ranks), torch.device(device), deadline_s
        self.nodes = Nodes(len(ranks), nodes).count
        self.meter, self.waits = Meter(), Waits()
        self.rank = 0 if len(ranks) == 1 else self._place_in_ring()
        self._under_way: list[_Batch] = []
        self._broken: RingBroken | None = None
        self._is_closed = False
        self._lines = self._lines_to_others()
        if len(ranks) > 1 and self.device.type == "cuda":
            # NCCL: all ranks must share in a group's first operation, and an exchange may skip some
            self.check_equal(len(ranks), "ring size")

    def post(self, send: dict[int, list[Tensor]], receive: dict[int, list[Tensor]], stage: str) -> Settle:
        self.raise_if_late()
        outgoing = [(self.ranks[rank], tensor.contiguous()) for rank, tensors in send.items() for tensor in tensors]
        incoming = [(self.ranks[rank], tensor) for rank, tensors in receive.items() for tensor in tensors]
        batch = _Batch(incoming, outgoing, stage, self.deadline_s)
        with self._hanging_up_when_broken(batch):
            if self.device.type != "cuda":
                batch.post_each(self.group)
                return lambda host: self._wait_on_host(batch)
            batch.post_together(self._lines)
        self._under_way.append(batch)
        return lambda host: self._wait_on_device(batch, host)

    def raise_if_late(self) -> None:
        """Raise RingBroken when a NCCL exchange posted more than deadline_s ago has not ended, or when the ring broke
        before; ConfigError when it was closed. Never blocks, but for hanging up."""
        if self._broken is not None:
            raise copy.copy(self._broken)
        if self._is_closed:
            raise ConfigError("an exchange over a closed ring", "one before close()", "make a new ring")
        self._under_way = [batch for batch in self._under_way if not batch.ended()]
        if self._under_way:
            with self._hanging_up_when_broken(self._under_way[0]):
                self._under_way[0].raise_if_late()

    def hang_up(self) -> None:
        """End all connections of the group, so that ranks that wait for this one notice; with gloo at once.

        Holds the caller for at most TEARDOWN_S. The group stays known to torch, for others that hold it: see `close`.
        """
        if self.size > 1 and self.group is not None:
            _bounded(self._abort)

    def close(self) -> None:
        """Hang up, destroy the group, and let go of tensors under way. May be called more than once.

        Holds the caller for at most twice TEARDOWN_S. Nothing can be exchanged any more.
        """
        self.hang_up()
        self._is_closed = True
        self._under_way.clear()
        self.group, lines, self._lines = None, self._lines, []
        if lines:
            _bounded(lambda: [dist.destroy_process_group(group) for group, _ in lines])

    def _abort(self) -> None:
        if self.device.type == "cuda":
            for group, _ in self._lines:
                group.abort()
            return
        # gloo's own abort leaves connections open; a wait that times out closes all of the group's
        for peer in (rank for place, rank in enumerate(self.ranks) if place != self.rank):
            with suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                dist.irecv(nothing, peer, self.group, tag=HANG_UP_TAG).wait(timedelta(milliseconds=1))

    def _wait_on_host(self, batch: "_Batch") -> None:
        if batch.works:
            with self._hanging_up_when_broken(batch), self.waits.of(batch.peers, batch.stage) as wait:
                batch.wait_on_host(wait)

    def _wait_on_device(self, batch: "_Batch", host: bool) -> None:
        with self._hanging_up_when_broken(batch):
            if host:
                with self.waits.of(batch.peers, batch.stage):
                    batch.poll()
            batch.wait_on_stream()
        if host:
            self.raise_if_late()  # lets go of the tensors of all batches that have ended

    @contextmanager
    def _hanging_up_when_broken(self, batch: "_Batch") -> Iterator[None]:
        try:
            yield
        except RingBroken as error:
            self._broken = copy.copy(error)  # without the traceback, whose frames hold tensors
            self._under_way.clear()
            self.hang_up()
            batch.let_go()
            raise

    def _lines_to_others(self) -> "Lines":
        """NCCL does a group's messages one after the other, and those to other nodes are slow: they get their own."""
        if self.group is None:
            return []
        near, topology = set(self.ranks), self.topology
        if self.device.type != "cuda" or not topology.two_links:
            return [(self.group, near)]
        near = {self.ranks[rank] for rank in topology.neighbours(self.rank)}
        return [(self.group, near), (second_group(self.group, self.ranks), set(self.ranks) - near)]

    def _place_in_ring(self) -> int:
        members = dist.get_process_group_ranks(self.group)
        if sorted(members) != sorted(self.ranks):
            raise ConfigError(f"ring of ranks {self.ranks}", f"the group's ranks {members}, in any order", "pass those")
        return self.ranks.index(dist.get_rank())


Lines = list[tuple[dist.ProcessGroup, set[int]]]
"""Groups, and which world ranks are reached over each. Every rank posts in this order."""


def second_group(group: dist.ProcessGroup, ranks: Sequence[int]) -> dist.ProcessGroup:
    """Another group of the same ranks. Collective among them, and no concern of others."""
    return dist.new_group(sorted(ranks), backend=dist.get_backend(group), use_local_synchronization=True)


class _Batch:
    """Messages posted together; knows whom to name when they do not end. Arrivals are waited for first."""

    def __init__(
        self,
        incoming: list[tuple[int, Tensor]],
        outgoing: list[tuple[int, Tensor]],
        stage: str,
        deadline_s: float,
    ):
        self.stage, self.deadline_s = stage, deadline_s
        self.messages = [(dist.irecv, *message) for message in incoming]  # tensors stay alive until the batch is let go
        self.messages += [(dist.isend, *message) for message in outgoing]
        self.peers = tuple(peer for _, peer, _ in self.messages)
        self.posted = time.monotonic()
        self.works: list[dist.Work] = []

    def post_each(self, group: dist.ProcessGroup) -> None:
        for verb, peer, tensor in self.messages:
            try:
                self.works.append(verb(tensor, peer, group))
            except RuntimeError as error:
                raise self._broken((peer,), self.posted, error) from None

    def post_together(self, lines: "Lines") -> None:
        """As NCCL needs it, so that no two ranks wait for each other."""
        for group, reached in lines:
            messages = [message for message in self.messages if message[1] in reached]
            operations = [dist.P2POp(verb, tensor, peer, group) for verb, peer, tensor in messages]
            try:
                self.works += dist.batch_isend_irecv(operations) if operations else []
            except RuntimeError as error:
                raise self._broken(self.peers, self.posted, error) from None

    def wait_on_host(self, wait: Wait) -> None:
        """For gloo: until all messages have ended or the deadline, counted from here, has passed."""
        for work in self.works:
            left_s = max(0.001, wait.since + self.deadline_s - time.monotonic())
            try:
                work.wait(timedelta(seconds=left_s))
            except RuntimeError as error:
                raise self._broken(self._silent_from(wait.came), wait.since, error) from None
            wait.came += 1

    def _silent_from(self, first: int) -> tuple[int, ...]:
        """Who did not come, once the message `first` has failed: the others are asked whether theirs had ended."""
        silent = [self.peers[first]]
        for peer, work in zip(self.peers[first + 1 :], self.works[first + 1 :]):
            try:
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                silent.append(peer)
        return tuple(dict.fromkeys(silent))

    def wait_on_stream(self) -> None:
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise self._broken(self._unended(), self.posted, error) from None

    def poll(self) -> None:
        """Block the host until the messages have ended or the deadline has passed."""
        while not self.ended():
            self.raise_if_late()
            time.sleep(POLL_S)

    def ended(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def raise_if_late(self) -> None:
        if time.monotonic() - self.posted > self.deadline_s:
            raise self._broken(self._unended(), self.posted)

    def let_go(self) -> None:
        self.works, self.messages = [], []

    def _unended(self) -> tuple[int, ...]:
        """NCCL ends messages posted together as one; where it tells them apart, those that came are left out."""
        if len(self.works) != len(self.peers):
            return self.peers
        late = [peer for peer, work in zip(self.peers, self.works) if not work.is_completed()]
        return tuple(late) or self.peers

    def _broken(self, silent: Sequence[int], began: float, error: RuntimeError | None = None) -> RingBroken:
        silent = tuple(dict.fromkeys(silent))
        cause = _words(error) if error else ""
        return RingBroken(silent[0], self.stage, time.monotonic() - began, cause, silent=silent)


def _words(error: RuntimeError) -> str:
    """gloo's first line without the place in its source and its advice."""
    return re.sub(r"^\[[^\]]*\] ?", "", str(error).splitlines()[0]).split(". This is")[0]


def _bounded(ending: Callable[[], None]) -> None:
    """Run what may block, for at most TEARDOWN_S; beyond that it goes on in its thread."""
    thread = threading.Thread(target=ending, name="sglang_mm teardown", daemon=True)
    thread.start()
    thread.join(TEARDOWN_S)
