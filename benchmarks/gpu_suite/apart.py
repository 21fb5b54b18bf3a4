"""Each job in a process of its own: a kernel that breaks the device, or hangs, ends that process and nothing else.

    this process   the suite, files                             asks the device for its name, and starts no kernel
    a process      the suite as it is by then -> job -> the suite with what the job found, told after every finding

What was at work when a process ended is not run again: the job is repeated without it.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from benchmarks.gpu_suite.report import RED, Check
from benchmarks.gpu_suite.suite import DeviceLost, Suite

LEAST_S = 150.0
LARGEST_SHARE = 0.5
"""A job that says nothing for LEAST_S, or this share of the time left where that is more, is taken to hang."""
PRELOADED = ["torch", "benchmarks.gpu_suite.jobs"]


class Job(NamedTuple):
    """run: a function of a module, or a partial of one, so that it can be sent to a process."""

    what: str
    run: Callable[[Suite], None]


class _News(NamedTuple):
    """ended: in good order. why: what ended the job otherwise."""

    suite: Suite
    ended: bool
    why: str = ""


def run_here(suite: Suite, job: Job) -> None:
    """What the job raises is reported. Raises DeviceLost."""
    torch.backends.cuda.matmul.allow_tf32 = False  # the oracle's products; kernels say for themselves what they use
    try:
        job.run(suite)
        suite.free()
    except Exception as error:  # any: what was measured so far is kept
        traceback.print_exc()
        suite.check_device(error)
        suite.report.fail(job.what, error)


def run_apart(suite: Suite, job: Job, silence_s: float | None = None) -> Suite:
    """The suite with what the job found. silence_s: how long it may say nothing, instead of what follows from the time
    that is left."""
    while True:
        silence = silence_s or max(LEAST_S, LARGEST_SHARE * suite.budget.left)
        last = _run(suite, job, silence)
        if last.ended:
            return last.suite
        culprit = last.suite.at_work
        if not culprit or culprit in suite.lost:
            last.suite.report.fail(job.what, last.why)
            return last.suite
        suite.lost += (culprit,)
        suite.report.checks.append(Check(job.what, culprit, RED, why=last.why))
        print(f"RED {culprit}: {last.why}; {job.what} once more without it", flush=True)


def _run(suite: Suite, job: Job, silence_s: float) -> _News:
    """The last news of a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(its, suite, job))
    process.start()
    its.close()
    last = _News(suite, False)
    try:
        while not (last.ended or last.why):
            if not mine.poll(silence_s):
                return last._replace(why=f"it said nothing for {silence_s:.0f} s, and was ended")
            last = mine.recv()
            last.suite.report.write()
    except EOFError:
        process.join()
        return last._replace(why=f"its process ended with exit code {process.exitcode}")
    finally:
        process.join(30 if last.ended else 0)
        process.kill()
        process.join(30)
        mine.close()
    return last


def _work(pipe: Connection, suite: Suite, job: Job) -> None:
    suite.report.tell = lambda: pipe.send(_News(suite, False))
    try:
        run_here(suite, job)
    except DeviceLost as lost:
        pipe.send(_News(suite, False, f"the device was lost: {lost}"))
        return
    pipe.send(_News(suite, True))
