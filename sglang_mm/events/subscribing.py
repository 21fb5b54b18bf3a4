"""Listening to a hub; every wait has an end."""

import time
from collections.abc import Iterator
from uuid import uuid4

import msgspec
import zmq

from sglang_mm.errors import ConfigError, SglangMMError
from sglang_mm.events.messages import Event, HubAlive, decode
from sglang_mm.events.wire import (
    ANSWER_DEADLINE_S,
    BEATS,
    LARGEST,
    LATE,
    LATE_WITH_BEATS,
    LIVE,
    LOST_AFTER_S,
    QUEUED,
    connect,
)


class Subscriber:
    """Listens to a hub. Raises ConfigError when none answers at `address` within deadline_s.

    beats: also heartbeats and waits of the ranks, which never cease.
    ignored counts messages that could not be read, as from another version of this package.
    """

    def __init__(self, address: str, deadline_s: float = ANSWER_DEADLINE_S, beats: bool = False):
        self.address, self.ignored = address, 0
        self._early: set[bytes] = set()  # heard live before the hub told what was missed, and told there again
        self._greeted = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, QUEUED)
        self._socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        for topic in (LIVE, *((BEATS,) if beats else ()), (LATE_WITH_BEATS if beats else LATE) + uuid4().bytes):
            self._socket.setsockopt(zmq.SUBSCRIBE, topic)
        try:
            connect(self._socket, address, f"events address {address}")
            if not self._socket.poll(int(deadline_s * 1000)):
                raise _nobody(address, deadline_s)
        except BaseException:
            self.close()
            raise
        self._heard_at = time.monotonic()

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None after timeout_s. Raises SglangMMError when the hub gives no sign of life."""
        end = time.monotonic() + timeout_s
        while True:
            left = max(0.0, end - time.monotonic())
            if not self._socket.poll(int(min(left, 1.0) * 1000)):
                if time.monotonic() - self._heard_at > LOST_AFTER_S:
                    raise SglangMMError(f"no sign of life from {self.address} for {LOST_AFTER_S:.0f} s: did it end?")
                if time.monotonic() >= end:
                    return None
                continue
            message = self._read()
            if message is not None and not isinstance(message, HubAlive):
                return message

    def _read(self) -> Event | None:
        self._heard_at = time.monotonic()
        try:
            topic, data = self._socket.recv_multipart()
            if topic.startswith((LATE, LATE_WITH_BEATS)):
                self._greeted = True
                return None if data in self._early else decode(data)
            if not self._greeted:
                self._early.add(data)
            return decode(data)
        except (msgspec.DecodeError, ValueError):
            self.ignored += 1
            return None

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def subscribe(address: str, timeout_s: float, deadline_s: float = ANSWER_DEADLINE_S) -> Iterator[Event]:
    """Events as they come, until none came for timeout_s. Raises as Subscriber does."""
    with Subscriber(address, deadline_s) as subscriber:
        while (message := subscriber.receive(timeout_s)) is not None:
            yield message


def _nobody(address: str, deadline_s: float) -> ConfigError:
    given = f"events address {address}, where no event stream answered within {deadline_s:g} s"
    return ConfigError(
        given, "the address in the server's /sglang_mm/status", "listen on the server's own machine, while it runs"
    )
