"""What `launch --dry-run` prints, and its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sglang_mm.dryrun import report
from sglang_mm.dryrun.fit import DoesNotFit
from sglang_mm.dryrun.run import Asked, prepare

DOES_NOT_FIT = 2


def show(asked: Asked, *, as_json: bool) -> int:
    """0; or 2 for a prompt that does not fit the GPU. Raises ConfigError for what cannot be asked."""
    with one_thread():
        return _show(asked, as_json)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compilation is many small operations: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _show(asked: Asked, as_json: bool) -> int:
    run = prepare(asked)
    refused = None
    try:
        run.require_fit()
    except DoesNotFit as error:
        refused = error
    if as_json:
        print(report.as_json(run, refused))
    else:
        print("\n".join([*report.layout_lines(run), *report.memory_lines(run)]), flush=True)
        if not refused:
            print("\n".join(report.program_heading(run)))
            for kind in run.compiled():
                print(report.program_line(kind), flush=True)
            print(f"  {run.seconds:.1f} s in all")
    if refused:
        print(f"sglang_mm: {refused}", file=sys.stderr)
        return DOES_NOT_FIT
    return 0
