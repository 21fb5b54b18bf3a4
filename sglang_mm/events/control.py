"""The hub's end of what ranks say of themselves: beats, faults, and the question who is the cause.

While a fault is looked into the hub calls every rank. A rank that lives beats at once, so that what it waits for is
known anew; one whose process has ended cannot be called, and one that is stopped does not answer.
"""

import time
from collections.abc import Callable

import msgspec
import zmq

from sglang_mm.events.inquiry import MOST_RANKS, Inquiry
from sglang_mm.events.messages import Ask, Fault, Heartbeat, RankLost, RankWaits, decode, encode
from sglang_mm.events.wire import ASK_WITHIN_S, BEATS, CALL, CALL_EVERY_S, QUEUED


class Control:
    """Belongs to the hub's thread, as its socket does. publish(data, topic=LIVE): tells subscribers of a message.

    waits: rank -> the newest RankWaits.
    """

    def __init__(self, socket: zmq.Socket, publish: Callable[..., None]):
        self.socket, self.publish, self.inquiry = socket, publish, Inquiry()
        self.waits: dict[int, RankWaits] = {}
        self._routes: dict[int, bytes] = {}
        self._asking: list[bytes] = []
        self._called_at = 0.0

    def receive(self) -> int:
        """All that has come, at most QUEUED messages; how many of them could not be read."""
        malformed = 0
        for _ in range(QUEUED):
            try:
                sender, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                (data,) = frames
                self._heard(sender, decode(data), data)
            except (msgspec.DecodeError, ValueError):
                malformed += 1
        return malformed

    def _heard(self, sender: bytes, message: object, data: bytes) -> None:
        if isinstance(message, Heartbeat):
            self.inquiry.heard(message)
            if message.rank in self.inquiry.beats:
                self._routes[message.rank] = sender
            self.publish(data, BEATS)
        elif isinstance(message, RankWaits):
            if message.rank in self.waits or len(self.waits) < MOST_RANKS:
                self.waits[message.rank] = message
            self.publish(data, BEATS)
        elif isinstance(message, Ask):
            self.told(message.fault, message.within_s)
            if self.inquiry.verdict is not None:
                self._send(sender, encode(self.inquiry.verdict))
            elif len(self._asking) < MOST_RANKS:
                self._asking.append(sender)
        else:
            raise ValueError(f"{type(message).__name__} is no message for the hub itself")

    def told(self, fault: Fault, within_s: float = ASK_WITHIN_S) -> None:
        self.inquiry.told(fault, within_s)
        self.publish(encode(fault))

    def lost(self, rank: int, reason: str) -> None:
        if self.inquiry.lost(rank, reason):
            self.publish(encode(RankLost(rank=rank, reason=reason)))

    def turn(self) -> None:
        """Call the ranks when it is time to, and answer those that ask when the verdict is found."""
        if not self.inquiry.is_open:
            return
        if time.monotonic() - self._called_at > CALL_EVERY_S:
            self._called_at = time.monotonic()
            for rank, route in list(self._routes.items()):
                if not self._send(route, CALL):
                    self.lost(rank, "its process ended")
        verdict = self.inquiry.decide()
        if verdict is not None:
            data = encode(verdict)
            self.publish(data)
            for sender in self._asking:
                self._send(sender, data)
            self._asking.clear()

    def forget(self) -> None:
        """All of it, as when the hub began; ranks that live are called, and beat at once."""
        for route in self._routes.values():
            self._send(route, CALL)
        self.inquiry = Inquiry()
        self.waits.clear()
        self._routes.clear()
        self._asking.clear()

    def beats(self) -> list[bytes]:
        """The newest of every rank, for a subscriber that comes late."""
        return [
            encode(message) for message in (*(beat for beat, _ in self.inquiry.beats.values()), *self.waits.values())
        ]

    def found(self) -> list[bytes]:
        """The same of faults."""
        inquiry = self.inquiry
        lost = [RankLost(rank=rank, reason=reason) for rank, reason in inquiry.losses.items()]
        verdict = [inquiry.verdict] if inquiry.verdict else []
        return [encode(message) for message in (*inquiry.faults.values(), *lost, *verdict)]

    def _send(self, route: bytes, data: bytes) -> bool:
        """False when nobody is there any more."""
        try:
            self.socket.send_multipart([route, data], zmq.NOBLOCK)
        except zmq.Again:  # it does not read: stopped, perhaps
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True
