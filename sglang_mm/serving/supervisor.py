"""Watches the ranks of a server or an engine; when one fails or is lost, whatever waits gets its answer, and ranks end.

    a rank tells its fault -.                        .- requests under way: 500 and the reason, later ones: 503
    its process ends -------+-- one verdict (hub) ---+- calls of an Engine raise RankFailed
    it falls silent --------+                        +- processes of ranks are killed, Ray's actors too
    Ray says that it died --'                        '- a server ends, with exit code 3

Everything here has a time limit: a server that could not end in time is ended by `os._exit`.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from sglang_mm.errors import RankFailed
from sglang_mm.events import EventHub
from sglang_mm.events.messages import Fault, Heartbeat, Verdict
from sglang_mm.serving.last_words import UnderWay

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 0.25
PATIENCE_S = 1.0  # for the hub's verdict, once something was told
ANSWER_S = 1.5  # for answers on their way to clients
END_S = 3.0  # from the verdict on, for everything that a server does before its process must be gone
LOADING_END_S = 15.0  # the same while ranks load: SGLang may be busy with something else
CLEANUP_S = 0.5  # of a process that is about to be ended by force
KILL_S = 1.0  # until killed processes are reaped
STILL_LOADING_S = 60.0  # a rank that loads may hold its interpreter for so long
FIRST_BEAT_S = 300.0  # of a rank, after that of another
FIRST_OF_ALL_S = 900.0  # of any rank, after the start
LEAST_SILENCE_S, MORE_S = 3.0, 0.5  # other threads of a rank may hold its interpreter for some seconds
SHARED_MEMORY = Path("/dev/shm")
_current: list["Supervisor"] = []


class Supervisor:
    """hub: hears the ranks. deadline_s: how long a rank may be silent, and stand still while others wait for it.

    under_way: what waits. failure: set once, and then nothing is watched any more. Use it in a `with`, or close it.
    """

    def __init__(self, hub: EventHub, deadline_s: float, world_size: int):
        self.hub, self.deadline_s, self.world_size = hub, deadline_s, world_size
        self.under_way = UnderWay()
        self.is_serving = False  # all ranks have loaded
        self.files: list[Path] = []  # deleted on leaving the `with`
        self._processes: dict[str, multiprocessing.Process] = {}
        self._before = set(multiprocessing.active_children())
        self._children: set[multiprocessing.Process] = set()
        self._ways_to_end: list[Callable[[], None]] = []
        self._then: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._told = ""  # by SGLang: it gave up, for a reason that the hub may know
        self._something, self._closing, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._first_beat_at: float | None = None
        self._awake_s, self._looked_at = 0.0, time.monotonic()
        self._heard: dict[int, tuple[float, float]] = {}  # of a rank: its newest beat, and when, in awake seconds
        _current.append(self)
        self._thread = threading.Thread(target=self._run, name="sglang_mm supervisor", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> RankFailed | None:
        return self.under_way.failure

    def raise_if_lost(self) -> None:
        """Raises RankFailed."""
        self.under_way.check()

    def lost(self, rank: int, reason: str) -> None:
        """The process of a rank has ended or cannot be reached any more. From any thread; reason: in one line."""
        if not self._closing.is_set():
            self.hub.lost(rank, reason)
            self._something.set()

    def gave_up(self, what: str) -> None:
        """SGLang would kill this process now. what: its reason, if nobody knows a better one."""
        self._told = self._told or what  # nothing more: signal handlers call this, which may take no lock

    def ends_ranks_by(self, end: Callable[[], None]) -> None:
        """More to be done than killing the processes of this machine; called once, from another thread."""
        self._ways_to_end.append(end)

    def ends_process_by(self, stop: Callable[[], None], cleanup: Callable[[], None]) -> None:
        """stop: called when answers are out and ranks have ended. If the process does not end by it in time: cleanup,
        and then it is ended by force."""
        self._then = stop, cleanup

    def follow(self, processes: dict[str, multiprocessing.Process]) -> None:
        """Ranks have loaded. processes: by SGLang's names, `scheduler_0` the one of rank 0."""
        self._processes, self.is_serving = processes, True

    def close(self) -> None:
        """From now on ranks may end. May be called more than once, from any thread."""
        self._closing.set()
        self._something.set()
        if self in _current:
            _current.remove(self)

    def wait_until_ended(self, deadline_s: float = PATIENCE_S + END_S) -> None:
        """After a failure: until all that follows from it is done."""
        self._ended.wait(deadline_s)

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_) -> None:
        self.close()
        ended = [process.pid for process in self._children if not process.is_alive()]
        segments = [path for pid in ended for path in SHARED_MEMORY.glob(f"sgl_shm_*_{pid}_*")]
        for path in [*self.files, *segments]:  # SGLang leaves them when its processes are killed
            path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._ended.set()

    def _watch(self) -> None:
        while not self._closing.is_set():
            self._something.wait(LOOK_EVERY_S)
            if self._closing.is_set():
                return
            try:
                self._look()
            except Exception:
                logger.exception("ranks could not be looked after")
            if self._told or self.hub.faults() or self.hub.losses():
                return self._end()

    def _look(self) -> None:
        """Tell the hub of ranks that are gone, or were silent for too long while this process was awake."""
        now = time.monotonic()
        self._awake_s += min(now - self._looked_at, 2 * LOOK_EVERY_S)  # it may have been stopped with its ranks
        self._looked_at = now
        self._children |= set(multiprocessing.active_children()) - self._before
        for name, process in self._processes.items():
            if not process.is_alive():
                self._is_gone(name, process.exitcode)
        for rank, (beat, age_s) in self.hub.beats().items():
            if self._heard.get(rank, (None,))[0] != beat.at:
                self._heard[rank] = beat.at, self._awake_s
            silent_s = min(age_s, self._awake_s - self._heard[rank][1])
            if silent_s > self._silence_s:
                self.hub.lost(rank, f"no sign of life for {silent_s:.1f} s: its process is stopped, or cut off")
            elif beat.waits_s > self.deadline_s + PATIENCE_S and beat.waits_for:
                self.hub.told(_stands_still(beat))
        self._look_for_missing()

    def _look_for_missing(self) -> None:
        """One rank that never beat, long after the first did: it hangs while it starts."""
        if not self._heard and not self.is_serving and self._awake_s > max(FIRST_OF_ALL_S, self.deadline_s):
            self.gave_up(f"no rank was heard of for {self._awake_s:.0f} s")
        if not self._heard or len(self._heard) >= self.world_size:
            return
        first = min(at for _, at in self._heard.values()) if self._first_beat_at is None else self._first_beat_at
        self._first_beat_at = first
        if self._awake_s - first > max(FIRST_BEAT_S, self.deadline_s):
            missing = next(rank for rank in range(self.world_size) if rank not in self._heard)
            self.hub.lost(missing, f"nothing was heard from it for {self._awake_s - first:.0f} s")

    @property
    def _silence_s(self) -> float:
        serving_s = max(self.deadline_s, LEAST_SILENCE_S) + MORE_S
        return serving_s if self.is_serving else max(serving_s, STILL_LOADING_S)

    def _is_gone(self, name: str, exit_code: int) -> None:
        kind, _, number = name.rpartition("_")
        if kind == "scheduler":
            self.hub.lost(int(number), f"its process ended: {ending(exit_code)}")
        else:
            self.gave_up(f"SGLang's {name} process ended: {ending(exit_code)}")

    def _end(self) -> None:
        """Once. The verdict, then the answers, then the ranks, then the rest."""
        if not (self.hub.faults() or self.hub.losses()):
            self._wait_for_words()
        verdict = self.hub.verdict(PATIENCE_S) if self.hub.faults() or self.hub.losses() else None
        failure = RankFailed(self._with_exit_code(verdict), self._told)
        logger.error("sglang_mm: %s", failure)
        if self._then:
            threading.Thread(target=self._last_resort, name="sglang_mm end", daemon=True).start()
        self.under_way.fail(failure)
        if not self.under_way.wait_until_left(ANSWER_S):
            logger.warning("%d requests could not be answered in time", len(self.under_way))
        self._end_ranks()
        self._ended.set()
        if self._then:
            self._then[0]()

    def _with_exit_code(self, verdict: Verdict | None) -> Verdict | None:
        """Other ranks see that a process has ended; only its parent sees how."""
        if verdict is None or verdict.what != "gone":
            return verdict
        beat = self.hub.beats().get(verdict.rank, (None,))[0]
        own = [self._processes.get(f"scheduler_{verdict.rank}"), *self._children]
        for process in filter(None, own):
            if (process is own[0] or (beat and process.pid == beat.pid)) and not process.is_alive():
                how = ending(process.exitcode)
                return verdict if how in verdict.reason else replace(verdict, reason=f"{verdict.reason}: {how}")
        return verdict

    def _wait_for_words(self) -> None:
        """SGLang hears of a rank's end from that rank, which may be faster than what it told the hub."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and not (self.hub.faults() or self.hub.losses()):
            time.sleep(0.05)
            self._look()

    def _end_ranks(self) -> None:
        threads = [threading.Thread(target=end, daemon=True) for end in self._ways_to_end]
        for thread in threads:
            thread.start()
        processes = list(self._processes.values())
        if not processes:  # still loading
            processes = [*self._children, *(set(multiprocessing.active_children()) - self._before - self._children)]
        for process in processes:
            process.kill()
        until = time.monotonic() + KILL_S
        for waited_for in [*processes, *threads]:
            waited_for.join(max(0.0, until - time.monotonic()))

    def _last_resort(self) -> None:
        time.sleep(END_S if self.is_serving else LOADING_END_S)
        logger.error("sglang_mm: the server did not end by itself in time")
        cleanup = threading.Thread(target=self._then[1], daemon=True)
        cleanup.start()
        cleanup.join(CLEANUP_S)
        sys.stderr.flush()
        os._exit(RankFailed.exit_code)


def _stands_still(beat: Heartbeat) -> Fault:
    """What a rank would tell if its wait had ended."""
    reason = f"rank {beat.rank} has waited for {beat.waits_s:.1f} s, in {beat.waits_in}"
    place = {"node": beat.node, "layer": beat.layer, "stage": beat.stage}
    waits = {"blames": beat.waits_for[0], "silent": beat.waits_for, "waited_s": beat.waits_s}
    return Fault(rank=beat.rank, what="waited", reason=reason, **place, **waits)


def ending(exit_code: int | None) -> str:
    """`killed by signal 9 (SIGKILL)`, or `exit code 1`"""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else "unknown"
        return f"killed by signal {-exit_code} ({name})"
    return f"exit code {exit_code}"


def current() -> Supervisor | None:
    """The newest supervisor of this process that is not closed."""
    return _current[-1] if _current else None


def is_only_one() -> bool:
    """Whether one supervisor alone is not closed: more engines than one may live in a process."""
    return len(_current) == 1
