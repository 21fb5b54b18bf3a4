"""`python -m sglang_mm.launch` with ranks in which a fault can be armed; see served_ranks.py."""

import sys

from sglang_mm.launch.__main__ import main as launch


def main(argv: list[str]) -> int:
    from sglang_mm.serving import worker
    from tests.faults.served_ranks import run_faulty_scheduler

    worker.run_scheduler_process = run_faulty_scheduler
    return launch(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
