"""Small jobs for processes of a pool."""

import os
import subprocess
import sys
import time

from tests.faults.pool import tell


def which() -> int:
    return os.getpid()


def fail() -> None:
    raise ValueError("as planned")


def die_after_a_word() -> None:
    tell("farewell")
    os._exit(7)


def hang_with_a_child() -> None:
    """A child that would outlive a parent killed alone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child {child.pid} runs", flush=True)
    time.sleep(600)
