"""python -m tests.batch.with_stub: the batch's command line, with the stub in place of the launcher."""

import sys

from sglang_mm.batch import client, run, server
from sglang_mm.batch.__main__ import main

LAUNCH = server.OwnServer._command


def command(own) -> list[str]:
    return ["tests.batch.stub" if word == "sglang_mm.launch" else word for word in LAUNCH(own)]


def hurry() -> None:
    """Shorter pauses; a server that does not end is killed after a second."""
    server.OwnServer._command = command
    client.FIRST_PAUSE_S, run.SETTLE_S, server.STOP_DEADLINE_S = 0.05, 0.3, 1.0


if __name__ == "__main__":
    hurry()
    sys.exit(main(sys.argv[1:]))
