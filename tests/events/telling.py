"""Ranks that tell: real processes with a publisher each, and waits with deadlines."""

import subprocess
import sys
import time
from collections.abc import Callable

from sglang_mm.events import ENV, Subscriber
from sglang_mm.events.messages import Event, PrefillStarted, StageDone

PATIENCE_S = 20.0


def started(prefill: str = "0:a", rank: int = 0, **about) -> PrefillStarted:
    """A start with plain numbers; `about` replaces fields."""
    fields = {"requests": ["a"], "ranks": 2, "new_tokens": 40, "cached_tokens": 2, "layers": 4, "schedule": "ring"}
    return PrefillStarted(prefill=prefill, rank=rank, at=time.time(), **{**fields, **about})


def stage_done(number: int, rank: int = 0, prefill: str = "0:a") -> StageDone:
    """Recognizable by `took`."""
    return StageDone(prefill=prefill, rank=rank, stage="vision", seconds=0.5, took=float(number))


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.005)


def hear(subscriber: Subscriber, count: int) -> list[Event]:
    """The next `count` events."""
    heard = [subscriber.receive(PATIENCE_S) for _ in range(count)]
    assert None not in heard, f"{heard.count(None)} of {count} events did not come"
    return heard


def process(script: str, address: str | None, *arguments: str, stdin: int | None = None) -> subprocess.Popen:
    """Python with `script`, as SGLang's ranks inherit the hub's address."""
    environment = {ENV: address} if address else {}
    command = [sys.executable, "-c", script, *arguments]
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def end_of(running: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    try:
        out, errors = running.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        running.kill()
        out, errors = running.communicate()
        raise AssertionError(f"it did not end: {out}{errors}") from None
    return running.returncode, out, errors
