"""Where a rank tells its events. Telling never waits: what does not fit into a queue is dropped and counted.

Without a hub, telling costs nothing and does nothing.
"""

import os
import threading
import time

import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.events.messages import Event, LayerDone, encode
from sglang_mm.events.wire import ENV, LAYERS_EVERY_S, QUEUED, connect


class Publisher:
    """Where a process tells its events; not tied to a thread. address: a hub's ranks_address, or None for nobody.

    dropped counts messages that found the queue full, or cannot be told. A forked process needs its own, which
    `publisher()` gives it.
    """

    def __init__(self, address: str | None, queued: int = QUEUED):
        self.address, self.dropped, self._pid = address, 0, os.getpid()
        self._layers_at = 0.0
        self._lock = threading.Lock()
        self._socket = self._context = None
        if address is None:
            return
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, queued)
        self._socket.setsockopt(zmq.LINGER, 0)  # a rank that ends must not wait for a hub that is gone
        try:
            connect(self._socket, address, f"{ENV} {address}")
        except ConfigError:
            self._context.destroy(linger=0)
            raise

    @property
    def on(self) -> bool:
        """Whether somebody may be told."""
        return self._socket is not None and self._pid == os.getpid()

    def emit(self, message: Event) -> bool:
        """Tell it without waiting, and without raising; False when it was left out (no hub, or one layer of many) or
        dropped."""
        if not self.on:
            return False
        with self._lock:
            if not self.on:  # closed meanwhile
                return False
            if isinstance(message, LayerDone) and not self._is_due(message):
                return False
            try:
                self._socket.send(encode(message), zmq.NOBLOCK)
            except (zmq.ZMQError, TypeError, ValueError, OverflowError):  # full; or what msgpack cannot hold
                self.dropped += 1
                return False
        return True

    def _is_due(self, message: LayerDone) -> bool:
        """At most one layer per LAYERS_EVERY_S, and always the last."""
        now = time.monotonic()
        if message.layer + 1 < message.layers and now - self._layers_at < LAYERS_EVERY_S:
            return False
        self._layers_at = now
        return True

    def close(self, linger_s: float = 1.0) -> None:
        """Give queued messages linger_s to leave, then let go."""
        with self._lock:
            if self.on:
                self._context.destroy(linger=int(linger_s * 1000))
            self._socket = None


_mine: Publisher | None = None


def publisher() -> Publisher:
    """This process's publisher, made when first asked for; tells nobody where no hub is in the environment."""
    global _mine
    if _mine is None or _mine._pid != os.getpid():
        _mine = Publisher(os.environ.get(ENV) or None)
    return _mine
