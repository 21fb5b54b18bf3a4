"""A server of the batch's own: real processes behind the guard, the stub in place of the launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

MODEL = ("--model-path", "M")


def starts(tmp_path) -> list[int]:
    """The processes of all its servers, by the log."""
    log = (tmp_path / "out.jsonl.server.log").read_text()
    return [int(number) for number in re.findall(r"ready at .*, process (\d+)", log)]


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def test_a_server_for_the_batch_alone(asked, tmp_path):
    code, lines, _ = asked(["a", "b"], *MODEL, "--cp", "2")
    assert code == 0 and [line["answer"] for line in lines] == ["a", "b"]
    (process,) = starts(tmp_path)
    assert not is_alive(process)
    assert asked(None, *MODEL, "--cp", "1")[0] == 0, "the same answers, however many ranks"
    assert starts(tmp_path) == [process], "nothing to ask, nothing started"
    assert asked(None, *MODEL, "--sparse", "auto")[0] == 2, "other answers"


def test_the_item_that_ends_servers_is_found(asked, tmp_path):
    questions = ["slow 0.2 a", "slow 1 b", "end", "slow 1 d", "e", "f"]
    code, lines, told = asked(questions, *MODEL)
    assert code == 3 and [line["answer"] is not None for line in lines] == [True, True, False, True, True, True]
    assert lines[2]["error"] == {
        "code": "server_ended",
        "message": "the server ended while it answered this item and no other",
    }
    assert len(starts(tmp_path)) == 3 and "the stub ends, as it was asked to" in told and "exit code 9" in told


def test_an_accident_is_nobody_s_fault(asked, tmp_path):
    code, lines, _ = asked(["a", f"end once {tmp_path / 'ended'}", "c"], *MODEL, "--concurrency", "1")
    assert code == 0 and [line["id"] for line in lines] == ["line-1", "line-2", "line-3"]
    assert len(starts(tmp_path)) == 2


def test_restarts_are_bounded_and_the_next_run_goes_on(asked, tmp_path):
    questions = ["a", "end", "end again", "d"]
    code, lines, told = asked(questions, *MODEL, "--restarts", "1", "--concurrency", "1")
    assert (code, lines) == (1, []) and "Restarts are used up (--restarts 1)" in told
    assert "run the same command again" in told
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.part").read_text().splitlines()]
    assert [(line["id"], line["error"] is None) for line in kept] == [("line-1", True), ("line-2", False)]
    code, lines, _ = asked(None, *MODEL, "--concurrency", "1")
    assert code == 3 and [line["error"] is None for line in lines] == [True, False, False, True]


@pytest.mark.parametrize(
    ("flags", "reason"), [(["--broken"], "the stub cannot start"), (["--port", "0"], "was not ready")]
)
def test_a_server_that_does_not_start(asked, flags, reason, tmp_path, monkeypatch):
    from sglang_mm.batch import server

    monkeypatch.setattr(server, "READY", server.READY if reason.startswith("the") else b"never said")
    code, _, told = asked(["a"], *MODEL, *flags, "--start-timeout", "30" if flags == ["--broken"] else "0.5")
    assert code == 1 and reason in told and "out.jsonl.server.log" in told
    assert all(not is_alive(process) for process in starts(tmp_path))


def command(tmp_path: Path, *flags: str) -> list[str]:
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    return [sys.executable, "-m", "tests.batch.with_stub", *files, *MODEL, *flags]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_batch(tmp_path, number):
    """Not even one that does not listen to SIGTERM, of a batch that had no time to clean up."""
    (tmp_path / "in.jsonl").write_text('{"question": "a"}\n{"question": "slow 60"}\n')
    running = subprocess.Popen(command(tmp_path, "--stubborn"), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        part, end = tmp_path / "out.jsonl.part", time.monotonic() + 30
        while not (part.exists() and part.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        (process,) = starts(tmp_path)
        assert is_alive(process)
        os.killpg(running.pid, number)
        running.wait(20)
        while is_alive(process) and time.monotonic() < end:
            time.sleep(0.02)
        assert not is_alive(process)
    finally:
        running.kill()
    assert json.loads(part.read_text())["answer"] == "a"
    assert running.returncode == (-9 if number == signal.SIGKILL else 143)
