"""python -m sglang_mm.batch.guard SECONDS COMMAND...: runs a server for as long as whoever started this lives.

Its standard input is a pipe from the batch. When that closes, because the batch is done, or was killed with no time to
clean up, the server is asked to end, and made to after SECONDS. What it leaves of its process group goes too.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

LEFTOVERS_S = 3.0
TICK_S = 0.1


def main(stop_deadline_s: float, command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the pipe alone decides; ignored ones the server would inherit
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_when_closed, args=(server, stop_deadline_s), daemon=True).start()
    code = server.wait()
    _end_group(server.pid)
    return code if code >= 0 else 128 - code


def _stop_when_closed(server: subprocess.Popen, deadline_s: float) -> None:
    while os.read(0, 4096):
        continue
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(deadline_s)  # the process ends meanwhile, and this daemon thread with it
        os.killpg(server.pid, signal.SIGKILL)


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        end = time.monotonic() + LEFTOVERS_S
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(TICK_S)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
