"""The store's answers to readers on other machines: rows of its files, by name, in a thread of its own."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from sglang_mm.errors import ConfigError
from sglang_mm.pixels.wire import ANSWER_BYTES, LARGEST_QUESTION, Answer, Read, is_name

LOOK_EVERY_MS = 100


class Answering:
    """Listens on a free port of `host`. Names are random, so that only who was told one can ask for it.

    answered, refused: questions so far. look: called some times a second, in that thread.
    Raises ConfigError for a host that is not this machine's.
    """

    def __init__(self, directory: Path, host: str, look: Callable[[], None]):
        self.directory, self.answered, self.refused, self._look = directory, 0, 0, look
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_QUESTION)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(f"tcp://{host}:*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            given = f"host {host} for pixels ({error.strerror})"
            raise ConfigError(given, "an address of this machine", "check how Ray knows this node") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="sglang_mm pixels", daemon=True)
        self._thread.start()

    def close(self, deadline_s: float = 5.0) -> None:
        self._closing.set()
        self._thread.join(deadline_s)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._look()
                if self._socket.poll(LOOK_EVERY_MS):
                    self._socket.send_multipart(self._answer(b"".join(self._socket.recv_multipart())))
        finally:
            self._context.destroy(linger=0)

    def _answer(self, data: bytes) -> list[bytes]:
        try:
            question = msgspec.msgpack.decode(data, type=Read)
            rows = self._rows(question)
        except (msgspec.DecodeError, ValueError, OSError) as error:
            self.refused += 1
            return [msgspec.msgpack.encode(Answer(refused=_in_words(error)))]
        self.answered += 1
        return [msgspec.msgpack.encode(Answer()), rows]

    def _rows(self, question: Read) -> bytes:
        size = question.rows * question.width
        if not is_name(question.name) or size > max(ANSWER_BYTES, question.width):
            raise ValueError(f"{question.rows} rows of {question.width} bytes of {question.name[:40]!r}")
        opened = os.open(self.directory / question.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            rows = os.pread(opened, size, question.first * question.width)
        finally:
            os.close(opened)
        if len(rows) != size:
            raise ValueError(f"rows {question.first} to {question.first + question.rows} are not in {question.name}")
        return rows


def _in_words(error: Exception) -> str:
    return "their request has ended" if isinstance(error, FileNotFoundError) else str(error)
