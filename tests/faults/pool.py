"""Rank processes that are used again and again: one that was killed is replaced, the others go on.

A process starts as a fork of a server that has torch loaded, in some hundredths of a second. Each leads a process group
of its own, writes what it prints to a file, and dies with whoever made the pool. Every wait has a deadline.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["torch.distributed", "tests.faults.ranks"]
START_DEADLINE_S = 60.0  # of the first process: the server imports torch before
TAIL = 2000  # characters of a log in a failed assertion
_to_parent: Connection | None = None


@dataclass
class Answer:
    """What came of one job in one process: a result, or a traceback, or the exit code of a process that died.

    notes: what it told while it ran.
    """

    result: Any = None
    failure: str = ""
    exit_code: int | None = None
    notes: list = field(default_factory=list)


def tell(note: Any) -> None:
    """In a rank: something for the parent, which has it even if this process dies the next moment."""
    _to_parent.send(("note", note))


class Pool:
    """`ranks` processes; close it, or use it in a `with`. folder: for what they print."""

    def __init__(self, ranks: int, folder: Path):
        self.ranks, self._folder = ranks, Path(folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: list[multiprocessing.Process | None] = [None] * ranks
        self._connections: list[Connection | None] = [None] * ranks
        self._notes: list[list] = [[] for _ in range(ranks)]
        self.started = 0
        self.restore()

    def restore(self) -> list[int]:
        """Start a process for every rank that has none that lives; those ranks."""
        missing = [rank for rank, process in enumerate(self._processes) if process is None or not process.is_alive()]
        for rank in missing:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, str(self._log(rank))), daemon=True)
            process.start()
            there.close()
            self._processes[rank], self._connections[rank] = process, here
        self.started += len(missing)
        for rank, answer in self.wait(missing, START_DEADLINE_S).items():
            assert answer.result == "ready", f"rank {rank} did not start: {answer}"
        return missing

    def run(self, fn: Callable, arguments: Sequence[tuple], deadline_s: float, awaited: Iterable[int] | None = None):
        """fn(*arguments[rank]) in every process; the answers of `awaited` by rank, by default of all. As `wait`."""
        self._send(range(self.ranks), fn, arguments)
        return self.wait(range(self.ranks) if awaited is None else awaited, deadline_s)

    def run_on(self, ranks: Iterable[int], fn: Callable, arguments: Sequence[tuple], deadline_s: float):
        """The same in some of the processes."""
        self._send(ranks, fn, arguments)
        return self.wait(ranks, deadline_s)

    def _send(self, ranks: Iterable[int], fn: Callable, arguments: Sequence[tuple]) -> None:
        for rank in ranks:
            self._notes[rank] = []
            self._connections[rank].send((fn, arguments[rank]))

    def wait(self, ranks: Iterable[int], deadline_s: float) -> dict[int, Answer]:
        """Answers by rank. A process that ends answers with its exit code. Past the deadline all are killed, and an
        assertion shows the ends of their logs."""
        end, answers, ranks = time.monotonic() + deadline_s, {}, list(ranks)
        while missing := [rank for rank in ranks if rank not in answers]:
            left_s = end - time.monotonic()
            if left_s <= 0:
                tails = self.tails()
                self.kill(range(self.ranks))
                raise AssertionError(f"ranks {missing} were still running after {deadline_s:g} s{tails}")
            connections = {self._connections[rank]: rank for rank in missing}
            for connection in wait(list(connections), left_s):
                self._hear(connections[connection], answers)
        return answers

    def _hear(self, rank: int, answers: dict[int, Answer]) -> None:
        try:
            kind, value = self._connections[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(5)
            answers[rank] = Answer(exit_code=self._processes[rank].exitcode, notes=self._notes[rank])
            return
        if kind == "note":
            self._notes[rank].append(value)
        else:
            answers[rank] = Answer(**{kind: value}, notes=self._notes[rank])

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._processes[rank].pid, number)

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def tails(self) -> str:
        """The ends of all logs, for assertions."""
        logs = [self._log(rank) for rank in range(self.ranks)]
        return "".join(f"\n--- {log.stem} ---\n{log.read_text()[-TAIL:]}" for log in logs if log.exists())

    def kill(self, ranks: Iterable[int]) -> None:
        """With all that they have started, stopped ones too."""
        for process in (self._processes[rank] for rank in ranks):
            if process and process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    process.kill()
                process.join(5)
                assert not process.is_alive(), f"process {process.pid} outlives SIGKILL"

    def close(self) -> None:
        self.kill(range(self.ranks))
        for connection in filter(None, self._connections):
            connection.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"


def _serve(connection: Connection, log: str) -> None:
    """A rank's life: one job after the other, until the parent hangs up."""
    global _to_parent
    os.setpgid(0, 0)
    _die_with_parent()
    _print_to(log)
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    _to_parent = connection
    connection.send(("result", "ready"))
    while True:
        try:
            fn, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = "result", fn(*arguments)
        except BaseException:
            answer = "failure", traceback.format_exc()
        connection.send(answer)


def _die_with_parent() -> None:
    """Also while stopped: the parent is the fork server, which ends when the test run does."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _print_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.close(file)
