"""A rank that fails tells the hub, and asks who is the cause."""

import logging
import os
import time

import msgspec
import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.events.messages import Ask, Fault, Verdict, decode, encode
from sglang_mm.events.wire import ASK_WITHIN_S, CONTROL_ENV, LARGEST, connect

logger = logging.getLogger(__name__)


def ask(fault: Fault, within_s: float = ASK_WITHIN_S, address: str | None = None) -> Verdict | None:
    """The hub's verdict, alike for all that ask; None when there is no hub, or none that answers in time.

    address: a hub's control_address, if it is not in the environment. Never raises for want of a hub.
    """
    address = address or os.environ.get(CONTROL_ENV)
    if not address:
        return None
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
            connect(socket, address, f"{CONTROL_ENV} {address}")
            socket.send(encode(Ask(fault=fault, within_s=within_s)), zmq.NOBLOCK)
            return _answer(socket, within_s)
    except (zmq.ZMQError, ConfigError, OSError, MemoryError, ValueError) as error:
        logger.warning("the event hub at %s could not be asked who is at fault: %s", address, error)
        return None


def _answer(socket: zmq.Socket, within_s: float) -> Verdict | None:
    end = time.monotonic() + within_s
    while socket.poll(int(max(0.0, end - time.monotonic()) * 1000)):
        try:
            answer = decode(socket.recv())
        except msgspec.DecodeError:
            continue
        if isinstance(answer, Verdict):
            return answer
    return None
