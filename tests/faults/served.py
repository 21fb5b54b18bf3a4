"""A real server in which a fault can be armed, its clients, and what is left of it afterwards."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from sglang_mm.demo import server as demo
from sglang_mm.pixels.store import PREFIX
from tests.faults.served_ranks import ENV
from tests.serving.observed import STATES

DEADLINE_S = 5.0
LATE_S = DEADLINE_S + 5  # what is promised
ANSWER_S = 60.0
SAMPLING = {"temperature": 0, "ignore_eos": True}


@dataclass
class Served:
    """fault: the file that arms one. folder: what the server may fill, its temporary directory and its log."""

    folder: Path
    port: int = field(default_factory=demo.free_port)
    process: subprocess.Popen | None = None
    shared_memory: set[str] = field(default_factory=lambda: _segments())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def fault(self) -> Path:
        return self.folder / "fault"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def last_line(self) -> str:
        return self.log.read_text().strip().splitlines()[-1]

    def start(self, checkpoint: str, *flags: str) -> None:
        temporary, states = self.folder / "tmp", self.folder / "states"
        temporary.mkdir(parents=True)
        states.mkdir()
        command = [sys.executable, "-m", "tests.faults.served_main", "--model-path", checkpoint, "--cp", "2"]
        command += ["--port", str(self.port), "--cp-min-tokens", "64", "--deadline", str(DEADLINE_S), *flags]
        environment = {**os.environ, ENV: str(self.fault), "TMPDIR": str(temporary), STATES: str(states)}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    def wait_until_ready(self) -> None:
        demo.wait_until_ready(self.process, self.log, 120)

    def ask(self, prompt: str, tokens: int = 4, **more) -> requests.Response:
        body = {"text": prompt, "sampling_params": {**SAMPLING, "max_new_tokens": tokens}, **more}
        return requests.post(f"{self.url}/generate", json=body, timeout=ANSWER_S, stream=more.get("stream", False))

    def all_is_free(self, within_s: float = 15.0) -> list[str]:
        """Of each rank: what is still held of K/V slots and request slots, once nothing should be; waits for that."""
        until = time.monotonic() + within_s
        while any(held := [_held(state) for state in self._states()]) and time.monotonic() < until:
            time.sleep(0.2)
        return list(filter(None, held))

    def _states(self) -> list[dict]:
        folder = self.folder / "states"
        for old in folder.iterdir():
            old.unlink()
        requests.get(f"{self.url}/server_info", timeout=20)
        until = time.monotonic() + 10
        while len(told := sorted(folder.glob("rank *"))) < 2:
            assert time.monotonic() < until, f"only {told} told what they hold"
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in told]

    def leave_in_mid_prefill(self, prompt: str, stream: bool) -> None:
        """Send a request, close the connection once a rank is in its layers."""
        struck = self.fault.with_suffix(".struck")
        struck.unlink(missing_ok=True)
        body = json.dumps({"text": prompt, "sampling_params": {**SAMPLING, "max_new_tokens": 4000}, "stream": stream})
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            head = (
                f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            until = time.monotonic() + 20
            while not struck.exists() and time.monotonic() < until:
                time.sleep(0.01)
            assert struck.exists(), "the prefill did not start"

    def left_over(self, within_s: float = 5.0) -> dict[str, list]:
        """Processes of its session, who listens on its port, new shared memory, files in its temporary directory."""
        until = time.monotonic() + within_s
        while (processes := processes_of(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        temporary = self.folder / "tmp"
        with socket.socket() as probe:
            listens = probe.connect_ex(("127.0.0.1", self.port)) == 0
        return {
            "processes": [process.pid for process in processes],
            "port": [self.port] if listens else [],
            "shared memory": sorted(_segments() - self.shared_memory),
            "files": [str(path) for path in temporary.rglob("*") if path.is_file() or path.is_socket()],
            "pixels": [str(path) for path in temporary.glob(f"{PREFIX}*")],
        }


@contextmanager
def served(folder: Path):
    """Afterwards nothing of it runs, whatever happened."""
    one = Served(folder)
    try:
        yield one
    finally:
        if one.process:
            for process in processes_of(one.process.pid):
                process.kill()
            one.process.wait(10)


def processes_of(session: int) -> list[psutil.Process]:
    """Living processes of a session, zombies aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def _segments() -> set[str]:
    """Python's semaphores aside: 32 bytes each, left by a process that is killed, and nothing says by which."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def _held(state: dict) -> str:
    slots, requests_ = state["slots"] - state["free"] - state["cached"], state["requests"] - state["free_requests"]
    return (
        f"{slots} slots, {state['locked']} locked, {requests_} requests"
        if slots or state["locked"] or requests_
        else ""
    )


class Client(threading.Thread):
    """One request, in a thread. status, text: of the answer; ended_at: time.time(); events: those of a stream."""

    def __init__(self, post, *args, **kwargs):
        super().__init__(daemon=True)
        self.post, self.args, self.kwargs = post, args, kwargs
        self.status, self.text, self.ended_at, self.error = 0, "", 0.0, None
        self.events: list[str] = []
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            reply = self.post(*self.args, **self.kwargs)
            self.status = reply.status_code
            if self.kwargs.get("stream"):
                for line in reply.iter_lines(decode_unicode=True):
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.begun.set()
            else:
                self.text = reply.text
        except requests.RequestException as error:
            self.error = error
        finally:
            self.ended_at = time.time()

    def message(self) -> str:
        """Of the error that it was told."""
        self.join(ANSWER_S)
        assert not self.is_alive() and self.error is None, f"no answer: {self.error}"
        told = json.loads(self.events[-2] if self.events else self.text)
        return told["error"]["message"]
