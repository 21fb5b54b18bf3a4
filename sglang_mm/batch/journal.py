"""What is answered so far: OUT.part while the batch runs, then OUT. Both hold lines of the output."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path

from sglang_mm.batch import records
from sglang_mm.errors import ConfigError


def beside(out: Path, suffix: str) -> Path:
    """OUT.part, OUT.server.log, OUT.tmp."""
    return out.with_name(out.name + suffix)


class Journal:
    """The lines of OUT and OUT.part by fingerprint; OUT.part is open and locked until the end of the `with`.

    Raises ConfigError if OUT cannot be written, or if another run writes it.
    """

    def __init__(self, out: Path):
        self.out, self._part = out, beside(out, ".part")
        if out.exists() and not out.is_file():
            raise ConfigError(f"OUT {out}", "a file", "pass another")
        try:
            self._file = self._part.open("a+b")
        except OSError as error:
            allowed = "a file in a directory that this user can write to"
            raise ConfigError(f"OUT {out} ({error.strerror})", allowed, "check the path") from None
        self._lock()
        self.finished = _read(out.read_bytes()) if out.exists() else {}
        self.foreign = _foreign(out.read_bytes()) if out.exists() else 0
        self._file.seek(0)
        kept = self._file.read()
        self._file.truncate(kept.rfind(b"\n") + 1)  # a line that was being written when the run was killed
        self.started = _read(kept)

    def _lock(self) -> None:
        busy = ConfigError(f"OUT {self.out}, which another run is writing", "one run per OUT", "wait for it, or end it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._part))
        except OSError:  # locked; or that run has just ended and removed the file
            same = False
        if not same:
            self._file.close()
            raise busy

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            self._part.unlink(missing_ok=True)
        self._file.close()

    def add(self, record: dict) -> None:
        """On disk when this returns. Raises OSError if the disk is full."""
        line = records.to_line(record)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.started[records.fingerprint_of(record)] = line

    def finish(self, lines: Iterable[bytes]) -> None:
        """Write OUT in one step, unless it holds the same already; remove OUT.part."""
        whole = b"".join(lines)
        if not self.out.exists() or self.out.read_bytes() != whole:
            draft = beside(self.out.resolve(), ".tmp")
            with draft.open("wb") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.out.resolve())
            _sync_folder(draft.parent)
        self._part.unlink(missing_ok=True)


def is_error(line: bytes) -> bool:
    return json.loads(line)["error"] is not None


def _decoded(data: bytes) -> Iterable[tuple[bytes, object]]:
    """Whole lines; None for those that are not JSON."""
    for line in data.split(b"\n")[:-1]:
        try:
            yield line + b"\n", json.loads(line)
        except ValueError:
            yield line + b"\n", None


def _read(data: bytes) -> dict[str, bytes]:
    """Answers win over errors, then later lines over earlier ones."""
    found: dict[str, bytes] = {}
    for line, record in _decoded(data):
        name = records.fingerprint_of(record)
        if name is not None and (name not in found or record["error"] is None or is_error(found[name])):
            found[name] = line
    return found


def _foreign(data: bytes) -> int:
    """Lines that no batch wrote."""
    tail = data.rpartition(b"\n")[2]
    return sum(records.fingerprint_of(record) is None for _, record in _decoded(data)) + bool(tail)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
