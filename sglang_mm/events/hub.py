"""From many ranks to whoever listens: ranks push to one hub, which publishes to subscribers on its machine.

The process that starts the ranks owns the hub and puts its addresses into their environment. It also hears that they
live, and finds the cause of their faults.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from itertools import chain

import msgspec
import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.events.control import Control
from sglang_mm.events.inquiry import MOST_RANKS
from sglang_mm.events.messages import (
    Event,
    Fault,
    Heartbeat,
    HubAlive,
    PrefillEnded,
    PrefillStarted,
    Verdict,
    decode,
    encode,
)
from sglang_mm.events.stragglers import Stragglers
from sglang_mm.events.wire import (
    ALIVE_EVERY_S,
    CONTROL_ENV,
    ENV,
    LARGEST,
    LATE,
    LATE_WITH_BEATS,
    LIVE,
    LONGEST_REASON,
    LOOPBACK,
    QUEUED,
    bind,
)

logger = logging.getLogger(__name__)


class EventHub:
    """PULL and ROUTER for the ranks, XPUB for subscribers, a daemon thread between them. Ports: free ones unless given.

    host: the address of this machine that ranks connect to; subscribers find the hub on loopback alone.
    address: for subscribers; ranks_address, control_address: for ranks; environment: what ranks must inherit. forwarded
    and malformed count messages. Raises ConfigError for a port that is taken, and for a host that is not one address of
    this machine. Close it, or use it in a `with`. Whatever is asked of it never waits for its thread unless it says so.
    """

    def __init__(
        self,
        port: int | None = None,
        ranks_port: int | None = None,
        host: str = LOOPBACK,
        control_port: int | None = None,
    ):
        self.forwarded = self.malformed = 0
        self._under_way: dict[int, list[bytes]] = {}
        self._closing = threading.Event()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._pull, self._publish, router = map(self._context.socket, (zmq.PULL, zmq.XPUB, zmq.ROUTER))
        for socket in (self._pull, router):
            socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        self._publish.setsockopt(zmq.SNDHWM, QUEUED)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self.ranks_address = bind(self._pull, ranks_port, host)
            self.control_address = bind(router, control_port, host)
            self.address = bind(self._publish, port)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self.environment = {ENV: self.ranks_address, CONTROL_ENV: self.control_address}
        self._control, self._stragglers = Control(router, self._tell), Stragglers()
        self._thread = threading.Thread(target=self._run, name="sglang_mm events", daemon=True)
        self._thread.start()

    def beats(self) -> dict[int, tuple[Heartbeat, float]]:
        """rank -> its newest heartbeat, seconds since it came."""
        return self._control.inquiry.ages()

    def faults(self) -> dict[int, Fault]:
        """rank -> the first fault that it told, in the order in which they came."""
        return dict(self._control.inquiry.faults)

    def losses(self) -> dict[int, str]:
        """rank -> why its process is known to have ended."""
        return dict(self._control.inquiry.losses)

    def lost(self, rank: int, reason: str) -> None:
        """The owner saw the process of a rank end. For any thread, also for signal handlers."""
        told = reason.encode(errors="backslashreplace").decode()[:LONGEST_REASON]
        self._orders.put(lambda: self._control.lost(rank, told))

    def told(self, fault: Fault) -> None:
        """The owner saw a rank fail that has not said so, or wait too long. For any thread and for signal handlers."""
        self._orders.put(lambda: self._control.told(fault))

    def verdict(self, patience_s: float = 0.0) -> Verdict | None:
        """Who is the cause of the first fault; the same for all that ask, until `forget`.

        None where nobody told a fault or was lost, or evidence is still coming in after patience_s: a second suffices.
        """
        end = time.monotonic() + patience_s
        while (found := self._control.inquiry.verdict) is None and time.monotonic() < end:
            time.sleep(0.005)
        return found

    def forget(self, deadline_s: float = 5.0) -> None:
        """Beats, faults, losses and the verdict: before new ranks start. Waits for the hub's thread."""
        done = threading.Event()
        self._orders.put(lambda: self._forget(done))
        done.wait(deadline_s)

    def close(self, deadline_s: float = 5.0) -> None:
        """Stop and free the ports. May be called more than once."""
        self._closing.set()
        self._thread.join(deadline_s)

    def __enter__(self) -> "EventHub":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _forget(self, done: threading.Event) -> None:
        self._control.forget()
        self._stragglers = Stragglers()
        done.set()

    def _run(self) -> None:
        """The sockets belong to this thread from here on."""
        poller = zmq.Poller()
        for socket in (self._pull, self._publish, self._control.socket):
            poller.register(socket, zmq.POLLIN)
        alive_at = 0.0
        try:
            while not self._closing.is_set():
                try:
                    self._turn(poller)
                except Exception:  # without this thread ranks would seem silent, and a server be ended for it
                    logger.exception("a message was lost")
                if time.monotonic() - alive_at > ALIVE_EVERY_S:
                    alive_at = time.monotonic()
                    self._send(LIVE, self._alive())
        finally:
            self._context.destroy(linger=0)

    def _turn(self, poller: zmq.Poller) -> None:
        control = self._control
        ready = dict(poller.poll(10 if control.inquiry.is_open else 50))
        if self._publish in ready:
            self._greet(self._publish.recv())
        for _ in range(QUEUED if self._pull in ready else 0):
            if not self._forward():
                break
        if control.socket in ready:
            self.malformed += control.receive()
        for _ in range(self._orders.qsize()):
            self._orders.get()()
        control.turn()

    def _forward(self) -> bool:
        """One message on to the subscribers; False when there is none."""
        try:
            frames = self._pull.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            (data,) = frames
            message = decode(data)
        except (msgspec.DecodeError, ValueError):
            self.malformed += 1
            return True
        self._keep(message, data)
        self._tell(data)
        if isinstance(message, PrefillEnded) and (straggler := self._stragglers.ended(message)):
            self._tell(encode(straggler))
        return True

    def _keep(self, message: Event, data: bytes) -> None:
        """The start and the newest message of every rank's prefill under way; a rank has one at a time."""
        rank = getattr(message, "rank", None)
        if isinstance(message, PrefillStarted):
            if rank in self._under_way or len(self._under_way) < MOST_RANKS:
                self._under_way[rank] = [data]
        elif isinstance(message, PrefillEnded):
            self._under_way.pop(rank, None)
        elif rank in self._under_way:
            self._under_way[rank][1:] = [data]

    def _greet(self, asked: bytes) -> None:
        """A subscriber's own topic tells it that there is a hub, and what it missed: prefills under way, faults."""
        subscribes, topic = asked[:1] == b"\x01", asked[1:]
        if subscribes and topic.startswith((LATE, LATE_WITH_BEATS)):
            self._send(topic, self._alive())
            beats = self._control.beats() if topic.startswith(LATE_WITH_BEATS) else []
            for data in chain(*self._under_way.values(), beats, self._control.found()):
                self._send(topic, data)

    def _alive(self) -> bytes:
        return encode(HubAlive(forwarded=self.forwarded, malformed=self.malformed))

    def _tell(self, data: bytes, topic: bytes = LIVE) -> None:
        self.forwarded += 1
        self._send(topic, data)

    def _send(self, topic: bytes, data: bytes) -> None:
        self._publish.send_multipart([topic, data])  # XPUB never blocks: it drops for who lags behind
