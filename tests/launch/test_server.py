"""`python -m sglang_mm.launch`, as a user runs it: real processes, real HTTP, real signals."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests

from sglang_mm.demo import server
from sglang_mm.tiny import write_checkpoint

LAUNCH = [sys.executable, "-m", "sglang_mm.launch"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def processes_of(session: int) -> list[psutil.Process]:
    """Living processes of a session, zombies aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if psutil.os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def wait_until_none_left(session: int, deadline_s: float) -> list[psutil.Process]:
    end = time.monotonic() + deadline_s
    while (left := processes_of(session)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def start(arguments: list[str], log) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen([*LAUNCH, *arguments], stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.mark.parametrize("ending", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serves_and_stops(ending, checkpoint, tmp_path):
    port, log, media = server.free_port(), tmp_path / "log", tmp_path / "media"
    media.mkdir()
    flags = ["--cp", "2", "--port", str(port), "--cp-min-tokens", "64", "--media-dir", str(media)]
    process = start(["--model-path", checkpoint, *flags], log)
    try:
        server.wait_until_ready(process, log)
        said = log.read_text()
        backends = "backends   prefill mm_ring, decode "
        sizes = ("each rank keeps 32 of the 64 tokens of a page", "fits       prompt + answer of up to")
        for line in ("tp 1 x cp 2 = 2 ranks", "schedule auto", backends, *sizes, f"127.0.0.1:{port}"):
            assert line in said
        url = f"http://127.0.0.1:{port}"
        body = {"text": "long enough " * 10, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        told = requests.post(f"{url}/generate", json=body, timeout=60).json()["meta_info"]
        schedule = told["sglang_mm"][0]["schedule"]
        assert schedule in ("ring", "gather")
        assert requests.get(f"{url}/sglang_mm/requests/{told['id']}", timeout=10).json() == told["sglang_mm"][0]
        assert requests.get(f"{url}/sglang_mm/requests/nobody", timeout=10).status_code == 404
        requests.post(f"{url}/generate", json={**body, "text": "short"}, timeout=60)
        status = requests.get(f"{url}/sglang_mm/status", timeout=10).json()
        assert status["requests"][schedule] == 1 and status["fallbacks"]["below --cp-min-tokens"] >= 1
        assert "not sharded: below --cp-min-tokens" in log.read_text()
        assert len(list(media.iterdir())) == 1
        process.send_signal(ending)
        process.wait(30)
        assert not wait_until_none_left(process.pid, 10) and not list(media.iterdir())
    finally:
        server.stop(process)


ENDINGS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def starting(checkpoint, tmp_path_factory):
    """A server for each signal, side by side: each spends its time on importing SGLang."""
    folder, words = tmp_path_factory.mktemp("starting"), ["--model-path", checkpoint, "--cp", "2", "--port"]
    started = {ending: start([*words, str(server.free_port())], folder / str(int(ending))) for ending in ENDINGS}
    try:
        for process in started.values():
            end = time.monotonic() + 90
            while len(processes_of(process.pid)) < 3 and time.monotonic() < end:
                time.sleep(0.1)
            assert len(processes_of(process.pid)) >= 3, "the ranks' processes did not start"
        for ending, process in started.items():
            process.send_signal(ending)
        yield started
    finally:
        for process in started.values():
            server.stop(process)


@pytest.mark.parametrize("ending", ENDINGS)
def test_stops_while_starting(ending, starting):
    starting[ending].wait(30)
    assert not wait_until_none_left(starting[ending].pid, 10)


REFUSED = {  # what is at fault: the command line
    "--model-path /nowhere": ["--model-path", "/nowhere", "--cp", "2"],
    "--no-such-flag": ["--model-path", "CHECKPOINT", "--cp", "2", "--no-such-flag"],
    "--port": ["--model-path", "CHECKPOINT", "--cp", "2", "--port", "BUSY"],
}


@pytest.fixture(scope="module")
def refused(checkpoint):
    """Launches that are refused, side by side: each spends its time on importing SGLang."""
    with server.socket.create_server(("127.0.0.1", 0)) as busy:
        known = {"CHECKPOINT": checkpoint, "BUSY": str(busy.getsockname()[1])}
        started = {
            fault: subprocess.Popen(
                [*LAUNCH, *(known.get(word, word) for word in words)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for fault, words in REFUSED.items()
        }  # fmt: skip
        try:
            yield started
        finally:
            for process in started.values():
                process.kill()


@pytest.mark.parametrize("fault", REFUSED)
def test_fails_early_with_one_clear_message(refused, fault):
    _, errors = refused[fault].communicate(timeout=120)
    assert refused[fault].returncode not in (0, None)
    assert fault in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
