"""The whole thing, slowly: SGLang itself as the batch's own server, with a batch and a rank that are killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_mm.tiny import write_checkpoint, write_video

pytestmark = pytest.mark.slow
ITEMS, TOKENS = 24, 24
START_S, RUN_S = 120, 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, a video and an input that asks about it."""
    folder = tmp_path_factory.mktemp("batch")
    write_checkpoint(folder / "tiny")
    write_video(folder / "shapes.mp4", seconds=8, fps=2)
    lines = [
        {"video": "shapes.mp4", "question": f"What moves {number}?", "max_tokens": TOKENS} for number in range(ITEMS)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def started(folder: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sglang_mm.batch", str(folder / "in.jsonl"), str(folder / name)]
    command += ["--model-path", str(folder / "tiny"), "--cp", "2", "--cp-min-tokens", "64", "--concurrency", "2"]
    with (folder / f"{name}.told").open("a") as told:
        return subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)


def wait_for_answers(folder: Path, name: str, least: int) -> None:
    part, end = folder / f"{name}.part", time.monotonic() + START_S
    while not (part.exists() and part.read_bytes().count(b"\n") >= least):
        assert time.monotonic() < end, (folder / f"{name}.told").read_text()[-3000:]
        time.sleep(0.01)


def server_processes(name: str) -> list[psutil.Process]:
    """Of the session of the server whose guard has its log at `name`; the guard's too."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "sglang_mm.launch" in words and process.info["status"] != psutil.STATUS_ZOMBIE and name in " ".join(words):
            found += [process, *process.children(recursive=True)]
    return list(dict.fromkeys(found))


def ended(process: subprocess.Popen) -> int:
    try:
        return process.wait(RUN_S)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """What a run writes that nothing disturbs."""
    assert ended(started(folder, "whole.jsonl")) == 0, (folder / "whole.jsonl.told").read_text()[-3000:]
    assert server_processes(str(folder / "tiny")) == []
    return (folder / "whole.jsonl").read_bytes()


def test_killed_batch_killed_rank_same_output(folder, whole):
    model = str(folder / "tiny")

    batch = started(folder, "out.jsonl")
    try:
        wait_for_answers(folder, "out.jsonl", 4)
        assert len(server_processes(model)) >= 4, "guard, launcher and two ranks"
    finally:
        batch.kill()
    end = time.monotonic() + 60
    while server_processes(model) and time.monotonic() < end:
        time.sleep(0.1)
    assert server_processes(model) == [], "the server outlives a batch that was killed"
    kept = (folder / "out.jsonl.part").read_bytes().count(b"\n")
    assert 4 <= kept < ITEMS

    batch = started(folder, "out.jsonl")
    try:
        wait_for_answers(folder, "out.jsonl", kept + 2)
        ranks = [process for process in server_processes(model) if "scheduler" in process.name()]
        assert len(ranks) == 2, [process.name() for process in server_processes(model)]
        ranks[1].send_signal(signal.SIGKILL)
        assert ended(batch) == 0, (folder / "out.jsonl.told").read_text()[-3000:]
    finally:
        batch.kill()
    told = (folder / "out.jsonl.told").read_text()
    assert "starting it again, 1 of at most 2 times" in told and f"{kept} are answered already" in told
    assert (folder / "out.jsonl").read_bytes() == whole
    assert server_processes(model) == []
    assert not (folder / "out.jsonl.part").exists()
