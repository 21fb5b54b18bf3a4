"""The monitor as a process, and events of a prefill on two ranks to feed it."""

import os
import subprocess
import sys
import time

from sglang_mm.events.messages import LayerDone, PrefillEnded, PrefillStarted

MONITOR = [sys.executable, "-m", "sglang_mm.launch.monitor"]
PATIENCE_S = 30


def started(rank: int, prefill: str = "0:a", requests: tuple = ("a",)) -> PrefillStarted:
    about = {"new_tokens": 31204, "cached_tokens": 5, "layers": 4, "schedule": "ring", "at": time.time()}
    return PrefillStarted(prefill=prefill, requests=list(requests), rank=rank, ranks=2, **about)


def layer(rank: int, number: int, seconds: float = 1.0) -> LayerDone:
    return LayerDone(prefill="0:a", rank=rank, layer=number, layers=4, seconds=seconds)


def ended(rank: int, error: str = "", prefill: str = "0:a", records: dict | None = None) -> PrefillEnded:
    return PrefillEnded(prefill=prefill, rank=rank, seconds=2.0 + rank, records=records or {}, error=error)


def start(*arguments: str, out=subprocess.PIPE, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.Popen([*MONITOR, *arguments], stdout=out, stderr=subprocess.PIPE, text=True, env=variables)


def end_of(running: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    try:
        out, errors = running.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        running.kill()
        raise AssertionError(f"it did not end: {running.communicate()}") from None
    assert "Traceback" not in errors
    return running.returncode, out, errors
