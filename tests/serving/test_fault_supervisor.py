"""The supervisor, with a real hub and real processes that beat like ranks: what it notices, when, and what follows."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from sglang_mm.errors import RankFailed
from sglang_mm.events import EventHub
from sglang_mm.serving.supervisor import Supervisor, current, ending

DEADLINE_S = 3.0
LATE_S = DEADLINE_S + 5  # what is promised
SPAWN = multiprocessing.get_context("spawn")


def beat(rank: int, address: str, stage: str = "layers") -> None:
    """A rank's process, as far as the supervisor can see."""
    from sglang_mm.events.vitals import vitals

    vitals.stage, vitals.layer = stage, 4
    vitals.start(rank, address=address)
    time.sleep(120)


@contextmanager
def supervised(ranks: int = 2):
    """(supervisor, processes), all beating."""
    with EventHub() as hub, Supervisor(hub, DEADLINE_S, ranks) as watch:
        processes = [SPAWN.Process(target=beat, args=(rank, hub.control_address)) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            until = time.monotonic() + 60
            while len(hub.beats()) < ranks and time.monotonic() < until:
                time.sleep(0.02)
            assert len(hub.beats()) == ranks
            watch.follow({f"scheduler_{rank}": process for rank, process in enumerate(processes)})
            yield watch, processes
        finally:
            watch.close()
            for process in processes:
                process.kill()


def failure_of(watch: Supervisor, within_s: float) -> RankFailed:
    until = time.monotonic() + within_s
    while watch.failure is None and time.monotonic() < until:
        time.sleep(0.02)
    assert watch.failure is not None, f"nothing was noticed within {within_s} s"
    watch.wait_until_ended()
    return watch.failure


@pytest.mark.parametrize(
    ("number", "what", "words"),
    [
        (signal.SIGKILL, "gone", "its process ended: killed by signal 9 (SIGKILL)"),
        (signal.SIGSTOP, "gone", "no sign of life for"),
    ],
)
def test_a_rank_that_is_gone_or_silent_is_named_and_the_others_end(number, what, words):
    with supervised() as (watch, processes):
        ended = []
        watch.ends_ranks_by(lambda: ended.append(True))
        os.kill(processes[1].pid, number)
        failure = failure_of(watch, LATE_S)
        assert failure.verdict.rank == 1 and words in str(failure) and failure.verdict.layer == 4
        assert not any(process.is_alive() for process in processes) and ended == [True]
        with pytest.raises(RankFailed, match="rank 1"):
            watch.raise_if_lost()


def test_what_others_say_counts_and_the_first_one_stays():
    with supervised() as (watch, processes):
        watch.lost(0, "its Ray actor on node a ended: out of memory")
        failure = failure_of(watch, 3)
        watch.lost(1, "later")
        assert failure.verdict.rank == 0 and "its Ray actor on node a ended: out of memory" in str(failure)
        assert watch.failure is failure and not any(process.is_alive() for process in processes)


def test_a_helper_process_that_ends_is_told_by_name():
    with supervised() as (watch, processes):
        helper = SPAWN.Process(target=int)
        helper.start()
        watch.follow({"scheduler_0": processes[0], "detokenizer": helper})
        assert "SGLang's detokenizer process ended: exit code 0" in str(failure_of(watch, 20))


def test_an_end_without_any_reason_is_told_as_such():
    with supervised() as (watch, _):
        watch.gave_up("SGLang ended itself, for the reason in the log")
        failure = failure_of(watch, 5)
        assert failure.verdict is None and str(failure).startswith("SGLang ended itself")


def test_nothing_is_noticed_once_it_is_closed():
    with supervised() as (watch, processes):
        assert current() is watch
        watch.close()
        processes[0].kill()
        time.sleep(1)
        assert watch.failure is None and current() is not watch and processes[1].is_alive()


def stopped_together() -> None:
    """A program of its own, whose process group is stopped from outside and goes on."""
    with supervised() as (watch, _):
        print("ready", flush=True)
        time.sleep(LATE_S + 3)
        print("failed" if watch.failure else "unharmed", flush=True)


@pytest.mark.slow
def test_a_program_that_was_stopped_as_a_whole_goes_on():
    code = (
        "if __name__ == '__main__':\n    from tests.serving.test_fault_supervisor import stopped_together as run; run()"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert program.stdout.readline() == "ready\n"
        os.killpg(program.pid, signal.SIGSTOP)
        time.sleep(LATE_S)
        os.killpg(program.pid, signal.SIGCONT)
        assert program.communicate(timeout=60)[0] == "unharmed\n"
    finally:
        os.killpg(program.pid, signal.SIGKILL)


def test_endings_are_told_in_words():
    assert ending(-9) == "killed by signal 9 (SIGKILL)" and ending(7) == "exit code 7"
