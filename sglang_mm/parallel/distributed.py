"""The ring over torch.distributed: gloo between CPU processes, NCCL between GPUs, point-to-point messages only.

gloo waits on the host and honours the deadline in each wait. NCCL waits on the device's stream, so the host runs
ahead; messages still under way past the deadline are noticed at the next exchange, or by whoever calls `raise_if_late`.
"""

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.parallel.meter import Meter
from sglang_mm.parallel.transport import Settle, Transport

POLL_S = 0.0005


class DistributedTransport(Transport):
    """A ring over `group`.

    ranks: the world ranks of the group in ring order; a group of one needs no torch.distributed and may be None.
    device: cpu for gloo, this rank's GPU for NCCL (it must be the current device). Creating a NCCL ring is collective.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, ranks: Sequence[int], device: torch.device | str, deadline_s: float
    ):
        self.group, self.ranks, self.device, self.deadline_s = group, tuple(ranks), torch.device(device), deadline_s
        self.meter = Meter()
        self.rank = 0 if len(ranks) == 1 else self._place_in_ring()
        self._under_way: deque[_Batch] = deque()
        if len(ranks) > 1 and self.device.type == "cuda":
            # NCCL: all ranks must share in a group's first operation, and an exchange may skip some
            self.check_equal(len(ranks), "ring size")

    def post(self, send: dict[int, list[Tensor]], receive: dict[int, list[Tensor]], stage: str) -> Settle:
        self.raise_if_late()
        outgoing = [(rank, tensor.contiguous()) for rank, tensors in send.items() for tensor in tensors]
        incoming = [(rank, tensor) for rank, tensors in receive.items() for tensor in tensors]
        peers = [self.ranks[rank] for rank, _ in incoming + outgoing]  # arrivals are waited for first
        operations = [dist.P2POp(dist.irecv, tensor, self.ranks[rank], self.group) for rank, tensor in incoming]
        operations += [dist.P2POp(dist.isend, tensor, self.ranks[rank], self.group) for rank, tensor in outgoing]
        batch = _Batch(operations, peers, stage, self.deadline_s)
        if self.device.type != "cuda":
            return lambda host: batch.wait_on_host()
        self._under_way.append(batch)
        return lambda host: self._settle_on_host(batch) if host else batch.wait_on_stream()

    def _settle_on_host(self, batch: "_Batch") -> None:
        batch.poll()
        self.raise_if_late()  # lets go of the tensors of all batches that have ended

    def raise_if_late(self) -> None:
        """Raise RingBroken when a NCCL exchange posted more than deadline_s ago has not ended. Never blocks."""
        while self._under_way and self._under_way[0].ended():
            self._under_way.popleft()
        if self._under_way:
            self._under_way[0].raise_if_late()

    def _place_in_ring(self) -> int:
        members = dist.get_process_group_ranks(self.group)
        if sorted(members) != sorted(self.ranks):
            raise ConfigError(f"ring of ranks {self.ranks}", f"the group's ranks {members}, in any order", "pass those")
        return self.ranks.index(dist.get_rank())


class _Batch:
    """Messages posted together; knows whom to name when they do not end."""

    def __init__(self, operations: list[dist.P2POp], peers: list[int], stage: str, deadline_s: float):
        self.peers, self.stage, self.deadline_s = peers, stage, deadline_s
        self.tensors = [operation.tensor for operation in operations]  # alive until the batch is
        self.posted = time.monotonic()
        try:
            self.works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise self._broken(peers[0], self.posted, error) from error

    def wait_on_host(self) -> None:
        began = time.monotonic()
        for peer, work in zip(self.peers, self.works, strict=True):
            left_s = max(0.001, began + self.deadline_s - time.monotonic())
            try:
                work.wait(timedelta(seconds=left_s))
            except RuntimeError as error:
                raise self._broken(peer, began, error) from error

    def wait_on_stream(self) -> None:
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise self._broken(self.peers[0], self.posted, error) from error

    def poll(self) -> None:
        """Block the host until the messages have ended or the deadline has passed."""
        while not self.ended():
            self.raise_if_late()
            time.sleep(POLL_S)
        self.wait_on_stream()

    def ended(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def raise_if_late(self) -> None:
        if time.monotonic() - self.posted > self.deadline_s:
            raise self._broken(self.peers[0], self.posted)

    def _broken(self, peer: int, began: float, error: RuntimeError | None = None) -> RingBroken:
        cause = str(error).splitlines()[0] if error else ""
        return RingBroken(peer, self.stage, time.monotonic() - began, cause)
