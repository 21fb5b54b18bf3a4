"""The files of a server's media: who may write them, how long they live, and what is left when a server dies.

    store/                  0700, in the system's temporary directory or below --media-dir
        lock                held while the server lives
        <32 hex digits>     one medium: its patches as bytes, row by row

A file lives as long as the lease it was written under, and `linger_s` longer; a lease lives as long as its request. A
directory whose lock can be taken belongs to a server that was killed; the next one removes it. (A lock rather than a
process id: ids are used again, and mean nothing between containers that share a directory.)
"""

import fcntl
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from pathlib import Path

from sglang_mm.errors import ConfigError
from sglang_mm.pixels.answering import Answering
from sglang_mm.pixels.wire import DIRECTORY, LOOPBACK, Home, PixelsGone, machine
from sglang_mm.pixels.writing import PatchWriter

PREFIX = "sglang_mm-pixels-"
LOCK = "lock"


class PatchStore:
    """parent: where the store's own directory is made. host: where readers on other machines find it; loopback unless
    told otherwise. linger_s: how long files outlive their request, for ranks that are behind the one which told of its
    end. environment: what ranks must inherit. Raises ConfigError for a parent that cannot be written to.

    Close it, or use it in a `with`: all its files are deleted.
    """

    def __init__(self, parent: str | Path | None = None, host: str = LOOPBACK, linger_s: float = 0.0):
        self.linger_s, self.is_for_one_machine = linger_s, host == LOOPBACK
        self._lingering: deque[tuple[float, list[str]]] = deque()  # when they are due, and their names
        self.parent = Path(parent or tempfile.gettempdir()).resolve()
        self.removed = remove_leftovers(self.parent)
        try:
            self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=self.parent))
        except OSError as error:
            given = f"--media-dir {self.parent} ({error.strerror})"
            raise ConfigError(given, "a directory that this user can write to", "pass another one") from None
        self._lock = _locked(self.directory / LOCK)
        try:
            self._answering = Answering(self.directory, host, self._delete_due)
        except ConfigError:
            shutil.rmtree(self.directory)
            os.close(self._lock)
            raise
        self.home = Home(machine(), self._answering.address)
        self.environment = {DIRECTORY: str(self.directory)}
        self.closed = False

    @property
    def address(self) -> str:
        """Where readers on other machines ask."""
        return self.home.address

    def lease(self, request: str = "") -> "Lease":
        """What the media of one request are written under. request: its id, for messages."""
        return Lease(self, request)

    def files(self) -> list[str]:
        """Names of the media that are there now."""
        return sorted(entry.name for entry in self.directory.iterdir() if entry.name != LOCK) if not self.closed else []

    def forget(self, names: list[str]) -> None:
        """Delete these files, when they have lingered."""
        self._lingering.append((time.monotonic() + self.linger_s, names))
        if not self.linger_s:
            self._delete_due()

    def delete(self, names: list[str]) -> None:
        """Delete these files now."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)

    def _delete_due(self) -> None:
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            try:
                _, names = self._lingering.popleft()
            except IndexError:  # another thread was faster
                return
            self.delete(names)

    def close(self) -> None:
        """Delete everything. May be called more than once."""
        if self.closed:
            return
        self.closed = True
        self._answering.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> "PatchStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Lease:
    """Keeps a request's files for as long as it lives, or until `release`; afterwards nothing can be written under it.

    It is hung on the request. Copies of a request share it; where a request is pickled, as into a dump of a crash, it
    stays behind.
    """

    def __init__(self, store: PatchStore, request: str):
        self.request, self._files = request, _Files(store)
        self.release = weakref.finalize(self, self._files.delete)
        """The request has ended."""

    def discard(self) -> None:
        """The request has ended before a rank heard of it: nothing has to linger."""
        self._files.delete(linger=False)

    @property
    def store(self) -> PatchStore:
        return self._files.store

    @property
    def alive(self) -> bool:
        """False when the request has ended: whoever is decoding for it can stop."""
        return not self._files.deleted and not self.store.closed

    def writer(self, rows: int, width: int, what: str) -> PatchWriter:
        """A new file of `rows` rows of `width` bytes. what: in words, for errors. Raises NoRoom, PixelsGone."""
        return PatchWriter(self.store.directory, self.store.home, rows, width, what, self._files)

    def __deepcopy__(self, _) -> "Lease":
        return self

    def __reduce__(self):
        return str, ()


class _Files:
    """The names under one lease, for its finalizer, which must not hold the lease itself."""

    def __init__(self, store: PatchStore):
        self.store, self.deleted = store, False
        self._names: list[str] = []
        self._guard = threading.Lock()

    def add(self, name: str) -> None:
        with self._guard:
            self.check()
            self._names.append(name)

    def check(self) -> None:
        if self.deleted or self.store.closed:
            raise PixelsGone("the request of these pixels has ended")

    def delete(self, linger: bool = True) -> None:
        with self._guard:
            self.deleted, names, self._names = True, self._names, []
        if names:
            self.store.forget(names) if linger else self.store.delete(names)


def remove_leftovers(parent: Path) -> list[str]:
    """Delete the stores of servers that did not live to do it; their names."""
    removed = []
    for path in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or one that is being made
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
    return removed


def _locked(path: Path) -> int:
    """The file, opened and locked until it is closed, which a killed process does too. It has its name once it is
    locked: another server may be looking for leftovers."""
    made = path.with_suffix(".new")
    lock = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    made.rename(path)
    return lock
