"""What this rank is doing, and the thread that tells the hub: a rank that says nothing has ended or is stopped.

Plain attributes that the rank sets as it works. The thread reads them, twice a second and when the hub calls.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.events.messages import Heartbeat, RankWaits, StageWaited, encode
from sglang_mm.events.wire import BEAT_EVERY_S, CONTROL_ENV, QUEUED, connect

logger = logging.getLogger(__name__)
QUEUED_BEATS = 8  # for a hub that is not there yet
BELL = "inproc://stop"  # each object has a context of its own


class Wait(Protocol):
    """A wait that goes on: world ranks, the exchange's name, time.monotonic() of its start."""

    ranks: tuple[int, ...]
    stage: str
    since: float


class Waited(Protocol):
    """Waits of one exchange that ended; bins: how many per bin of a histogram."""

    count: int
    seconds: float
    longest_s: float
    bins: list[int]


class Vitals:
    """rank: in the world. layer: -1 outside of layers; layers: of the model; stage: of the prefill, or empty."""

    def __init__(self):
        self.rank, self.node = 0, ""
        self.layer, self.layers, self.stage = -1, 0, ""
        self.address: str | None = None
        self._read: Callable[[], Wait | None] | None = None
        self._take: Callable[[], dict[str, Waited]] | None = None
        self._edges_s: tuple[float, ...] = ()
        self._waited: dict[str, StageWaited] = {}
        self._waited_is_new = False
        self._thread: threading.Thread | None = None
        self._bell: zmq.Socket | None = None

    def follow(
        self,
        read: Callable[[], Wait | None],
        take: Callable[[], dict[str, Waited]] | None = None,
        edges_s: tuple[float, ...] = (),
    ) -> None:
        """read: what this rank waits for now, called in the thread. take: the waits that ended since it was last asked,
        by exchange, called by `rested`; edges_s: upper edges of their bins."""
        self._read, self._take, self._edges_s = read, take, tuple(edges_s)

    def start(self, rank: int, node: str = "", address: str | None = None) -> None:
        """Beat from now on; again for another rank, which ends the former. node: its machine, where there are several.

        address: a hub's control_address, if it is not in the environment. Without a hub nothing is started. Raises
        ConfigError for an address that is none.
        """
        self.stop()
        self.rank, self.node, self.address = rank, node, address or os.environ.get(CONTROL_ENV) or None
        if self.address is None:
            return
        context = zmq.Context()
        socket, bell, self._bell = map(context.socket, (zmq.DEALER, zmq.PAIR, zmq.PAIR))
        self._bell.bind(BELL)
        bell.connect(BELL)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, QUEUED_BEATS)
        try:
            connect(socket, self.address, f"{CONTROL_ENV} {self.address}")
        except ConfigError:
            context.destroy(linger=0)
            raise
        beating = (context, socket, bell)
        self._thread = threading.Thread(target=self._run, args=beating, name="sglang_mm vitals", daemon=True)
        self._thread.start()

    def stop(self, deadline_s: float = 2.0) -> None:
        """May be called more than once."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            self._bell.send(b"", zmq.NOBLOCK)
            self._thread.join(deadline_s)
        self._thread = None

    def rested(self) -> None:
        """A prefill is over: between prefills there is no layer and no stage. What raised is left where it was."""
        self.layer, self.stage = -1, ""
        if self._take is None:
            return
        sums = dict(self._waited)
        for stage, waits in self._take().items():
            sums[stage] = _sum(sums.get(stage), waits)
            self._waited_is_new = True
        self._waited = sums

    def beat(self) -> Heartbeat:
        """As of now."""
        wait = self._reading()
        return Heartbeat(
            rank=self.rank,
            node=self.node,
            pid=os.getpid(),
            layer=self.layer,
            layers=self.layers,
            stage=self.stage,
            waits_for=list(wait.ranks) if wait else [],
            waits_s=max(0.0, time.monotonic() - wait.since) if wait else 0.0,
            waits_in=wait.stage if wait else "",
            at=time.time(),
        )

    def _reading(self) -> Wait | None:
        try:
            return self._read() if self._read else None
        except Exception:  # a transport that is being torn down; without a beat this rank would be taken for dead
            logger.exception("what rank %d waits for could not be read, and is no longer told", self.rank)
            self._read = None
            return None

    def _run(self, context: zmq.Context, socket: zmq.Socket, bell: zmq.Socket) -> None:
        """Both sockets belong to this thread from here on."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        try:
            while True:
                self._tell(socket)
                ready = dict(poller.poll(int(BEAT_EVERY_S * 1000)))
                if bell in ready:
                    return
                if socket in ready:
                    _drain(socket)
        finally:
            context.destroy(linger=0)

    def _tell(self, socket: zmq.Socket) -> None:
        try:
            socket.send(encode(self.beat()), zmq.NOBLOCK)
            if self._waited_is_new:
                self._waited_is_new = False
                told = RankWaits(rank=self.rank, node=self.node, stages=self._waited, edges_s=list(self._edges_s))
                socket.send(encode(told), zmq.NOBLOCK)
        except zmq.Again:  # nobody reads
            pass


def _sum(earlier: StageWaited | None, waits: Waited) -> StageWaited:
    if earlier is None:
        return StageWaited(waits.count, waits.seconds, waits.longest_s, list(waits.bins))
    return StageWaited(
        earlier.count + waits.count,
        earlier.seconds + waits.seconds,
        max(earlier.longest_s, waits.longest_s),
        [a + b for a, b in zip(earlier.bins, waits.bins)],
    )


def _drain(socket: zmq.Socket) -> None:
    """Calls of the hub; one beat answers all."""
    for _ in range(QUEUED):
        try:
            socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return


vitals = Vitals()
"""This process' own."""
