"""From many ranks to whoever listens: ranks push to one hub, which publishes to subscribers, all on this machine.

The process that starts the ranks owns the hub and puts its address into their environment.
"""

import threading
import time
from itertools import chain

import msgspec
import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.events.messages import Event, HubAlive, PrefillEnded, PrefillStarted, decode, encode
from sglang_mm.events.wire import ALIVE_EVERY_S, ENV, LARGEST, LIVE, QUEUED, bind

MOST_RANKS = 1024  # whose prefill under way is told to subscribers who come late


class EventHub:
    """PULL for the ranks, XPUB for subscribers, a daemon thread between them. Ports: free ones unless given.

    address: for subscribers; ranks_address: for publishers; environment: what ranks must inherit. forwarded and
    malformed count messages. Raises ConfigError for a port that is taken. Close it, or use it in a `with`.
    """

    def __init__(self, port: int | None = None, ranks_port: int | None = None):
        self.forwarded = self.malformed = 0
        self._under_way: dict[int, list[bytes]] = {}
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._pull, self._publish = self._context.socket(zmq.PULL), self._context.socket(zmq.XPUB)
        self._pull.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        self._publish.setsockopt(zmq.SNDHWM, QUEUED)
        try:
            self.ranks_address = bind(self._pull, ranks_port)
            self.address = bind(self._publish, port)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self.environment = {ENV: self.ranks_address}
        self._thread = threading.Thread(target=self._run, name="sglang_mm events", daemon=True)
        self._thread.start()

    def close(self, deadline_s: float = 5.0) -> None:
        """Stop and free the ports. May be called more than once."""
        self._closing.set()
        self._thread.join(deadline_s)

    def __enter__(self) -> "EventHub":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        """The sockets belong to this thread from here on."""
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._publish, zmq.POLLIN)
        alive_at = 0.0
        try:
            while not self._closing.is_set():
                ready = dict(poller.poll(50))
                if self._publish in ready:
                    self._greet(self._publish.recv())
                for _ in range(QUEUED if self._pull in ready else 0):
                    if not self._forward():
                        break
                if time.monotonic() - alive_at > ALIVE_EVERY_S:
                    alive_at = time.monotonic()
                    self._send(LIVE, self._alive())
        finally:
            self._context.destroy(linger=0)

    def _forward(self) -> bool:
        """One message on to the subscribers; False when there is none."""
        try:
            frames = self._pull.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            (data,) = frames
            self._keep(decode(data), data)
        except (msgspec.DecodeError, ValueError):
            self.malformed += 1
            return True
        self.forwarded += 1
        self._send(LIVE, data)
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
        """A subscriber's own topic tells it that there is a hub, and what it missed of the prefills under way."""
        subscribes, topic = asked[:1] == b"\x01", asked[1:]
        if subscribes and topic != LIVE:
            self._send(topic, self._alive())
            for data in chain.from_iterable(self._under_way.values()):
                self._send(topic, data)

    def _alive(self) -> bytes:
        return encode(HubAlive(forwarded=self.forwarded, malformed=self.malformed))

    def _send(self, topic: bytes, data: bytes) -> None:
        self._publish.send_multipart([topic, data])  # XPUB never blocks: it drops for who lags behind
