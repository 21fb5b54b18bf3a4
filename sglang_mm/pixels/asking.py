"""Reading rows of a store that runs on another machine: only those that are asked for, with a deadline."""

import threading

import msgspec
import zmq

from sglang_mm.pixels.wire import ANSWER_BYTES, ANSWER_DEADLINE_S, Answer, PixelsGone, Read

_mine = threading.local()  # a socket belongs to one thread


def read(address: str, name: str, first: int, last: int, width: int, into: memoryview) -> None:
    """Fill `into` with rows [first, last) of a file, each of `width` bytes. Raises PixelsGone."""
    each = max(1, ANSWER_BYTES // width)
    for low in range(first, last, each):
        high = min(low + each, last)
        data = _ask(address, Read(name, low, high - low, width))
        if len(data) != (high - low) * width:
            raise PixelsGone(f"{address} sent {len(data)} bytes of pixels {name} where {(high - low) * width} are due")
        at = (low - first) * width
        into[at : at + len(data)] = data


def _ask(address: str, question: Read) -> memoryview:
    socket = _socket(address)
    try:
        socket.send(msgspec.msgpack.encode(question))
        if not socket.poll(int(ANSWER_DEADLINE_S * 1000)):
            raise PixelsGone(
                f"{address} did not send pixels within {ANSWER_DEADLINE_S:g} s: can this machine reach it?"
            )
        head, *rest = socket.recv_multipart(copy=False)
        answer = msgspec.msgpack.decode(head.bytes, type=Answer)
    except (PixelsGone, zmq.ZMQError, msgspec.DecodeError) as error:
        _mine.sockets.pop(address).close(linger=0)  # a socket that waits for an answer cannot ask again
        if isinstance(error, PixelsGone):
            raise
        raise PixelsGone(f"{address} did not send pixels ({error})") from None
    if answer.refused or len(rest) != 1:
        raise PixelsGone(f"{address} sent no pixels: {answer.refused or 'an answer without them'}")
    return rest[0].buffer


def _socket(address: str) -> zmq.Socket:
    if not hasattr(_mine, "sockets"):
        _mine.context, _mine.sockets = zmq.Context(), {}
    if address not in _mine.sockets:
        socket = _mine.context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        _mine.sockets[address] = socket
    return _mine.sockets[address]
