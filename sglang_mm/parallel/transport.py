"""How tensors travel between the C ranks of one ring. An implementation provides `post`; the rest follows.

Tensors without elements never travel: sender and receiver both know from the layout that nothing is there. Ranks are
places in the ring, 0 .. C-1; errors name world ranks. Every wait ends after `deadline_s` seconds in RingBroken.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError, RankMismatch
from sglang_mm.parallel.meter import Meter
from sglang_mm.parallel.nodes import Nodes
from sglang_mm.parallel.waiting import Waits

Settle = Callable[[bool], None]
"""Waits for posted messages. True: until the host may read the values; False: until the device's stream may."""


@dataclass(frozen=True)
class Transfer:
    """Tensors under way. The ones that were sent must not be written to before `wait`."""

    arrivals: list[Tensor]
    settle: Settle

    def wait(self, host: bool = False) -> list[Tensor]:
        """The received tensors. host: they will be read by the host. Raises RingBroken past the deadline."""
        self.settle(host)
        return self.arrivals


class Transport(Protocol):
    """One rank's end of the ring. device: where tensors must lie; deadline_s: seconds any wait may take.

    meter: what this rank has sent so far, by kind of message. waits: what it waits for right now, and its waits so far.
    nodes: on how many its ranks lie, equally many on each, consecutive.
    """

    rank: int
    ranks: Sequence[int]
    device: torch.device
    deadline_s: float
    meter: Meter
    waits: Waits
    nodes: int = 1

    def post(self, send: dict[int, list[Tensor]], receive: dict[int, list[Tensor]], stage: str) -> Settle:
        """What `exchange` does, for tensors with elements, uncounted."""
        ...

    def exchange(
        self, send: dict[int, list[Tensor]], receive: dict[int, list[Tensor]], stage: str, kind: str = "other"
    ) -> Settle:
        """Post messages to and from other ranks and return at once. Buffers in `receive` are filled once settled.

        Sent tensors must not be written to before. stage: what errors say; kind: under which the meter counts.
        """
        send, receive = _with_elements(send), _with_elements(receive)
        account = self.meter.count(kind, (tensor for tensors in send.values() for tensor in tensors))
        account.bytes_across += self._bytes_across(send)
        wait = self.post(send, receive, stage)

        def settle(host: bool) -> None:
            began = time.perf_counter()
            wait(host)
            account.host_waited_s += time.perf_counter() - began

        return settle

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def topology(self) -> Nodes:
        """Which of its ranks share a node. Raises ConfigError when they do not fit `nodes`."""
        return Nodes(self.size, self.nodes)

    def _bytes_across(self, send: dict[int, list[Tensor]]) -> int:
        nodes = self.topology
        return sum(t.nbytes for rank, tensors in send.items() if nodes.are_apart(self.rank, rank) for t in tensors)

    def shift(
        self, tensors: Sequence[Tensor], like: Sequence[Sequence[int]], stage: str = "shift", kind: str = "other"
    ) -> Transfer:
        """Send tensors to rank + 1 and receive as many, of shapes `like` and the same dtypes, from rank - 1."""
        if self.size == 1:
            return Transfer(list(tensors), _nothing_to_wait_for)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        arrivals = [tensor.new_empty(tuple(shape)) for tensor, shape in zip(tensors, like, strict=True)]
        return Transfer(arrivals, self.exchange({after: list(tensors)}, {before: arrivals}, stage, kind))

    def all_to_all(
        self,
        send: Sequence[Tensor],
        receive_rows: Sequence[int],
        stage: str = "all_to_all",
        host: bool = False,
        kind: str = "other",
    ) -> list[Tensor]:
        """Send send[r] [n, ...] to rank r and return, per rank r, the receive_rows[r] rows that r sent here.

        All ranks send one dtype and one shape but for n. Raises ConfigError when the lists do not fit the ring.
        """
        if len(send) != self.size or len(receive_rows) != self.size or receive_rows[self.rank] != len(send[self.rank]):
            given = f"rank {self.rank} sends {[len(tensor) for tensor in send]} rows and receives {list(receive_rows)}"
            raise ConfigError(given, f"{self.size} entries, the own one alike", "build both tables from one layout")
        peers = [rank for rank in range(self.size) if rank != self.rank]
        arrivals = [send[r].new_empty((rows, *send[r].shape[1:])) for r, rows in enumerate(receive_rows)]
        arrivals[self.rank] = send[self.rank]
        if peers:
            outgoing = {rank: [send[rank]] for rank in peers}
            incoming = {rank: [arrivals[rank]] for rank in peers}
            self.exchange(outgoing, incoming, stage, kind)(host)
        return arrivals

    def sum_(self, tensor: Tensor, stage: str = "sum", kind: str = "other") -> Tensor:
        """Replace tensor by its sum over the ranks, the same bits on all: partials are added in rank order.

        For small tensors: each rank sends all of it to every other, so that a late rank can be named.
        """
        flat = tensor.reshape(-1)
        first, *others = self.all_to_all([flat] * self.size, [len(flat)] * self.size, stage, kind=kind)
        total = first.clone()
        for part in others:
            total += part
        return tensor.copy_(total.view_as(tensor))

    def check_equal(self, number: int, what: str) -> None:
        """Raise RankMismatch on every rank when `number`, 0 <= number < 2**64, is not the same on all ranks."""
        signed = number - (1 << 64) if number >> 63 else number
        mine = torch.tensor([signed], dtype=torch.int64, device=self.device)
        numbers = self.all_to_all([mine] * self.size, [1] * self.size, f"check of {what}", True, "checks")
        given = {rank: int(theirs) % (1 << 64) for rank, theirs in zip(self.ranks, numbers, strict=True)}
        if len(set(given.values())) > 1:
            listed = ", ".join(f"rank {rank}: {value:#018x}" for rank, value in given.items())
            raise RankMismatch(f"ranks differ in {what} ({listed}). Start all ranks with one version and one input.")


def _with_elements(messages: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
    return {rank: [tensor for tensor in tensors if tensor.numel()] for rank, tensors in messages.items()}


def _nothing_to_wait_for(host: bool) -> None:
    pass
