"""See the package's docstring: python -m benchmarks.gpu_suite --out DIR [--quick]

Exit status: 0 all green, 1 something is red or failed, 2 there is no CUDA device.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

import benchmarks.gpu_suite
from benchmarks.gpu_suite.apart import run_apart, run_here
from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.facts import gather_facts
from benchmarks.gpu_suite.jobs import STEPS, UNTIMED, jobs_of
from benchmarks.gpu_suite.report import REHEARSAL, Report
from benchmarks.gpu_suite.sizes import FULL, QUICK, Sizes
from benchmarks.gpu_suite.sizes import REHEARSAL as TOY
from benchmarks.gpu_suite.suite import Suite

NO_DEVICE = (
    "gpu_suite: torch {version} finds no CUDA device. Remedy: run it on a machine with an NVIDIA GPU of compute "
    "capability 8.0 or later and a torch that is built for CUDA; nvidia-smi tells whether the driver sees it."
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print(NO_DEVICE.format(version=torch.__version__), file=sys.stderr)
        return 2
    sizes = TOY if options.rehearse else QUICK if options.quick else FULL
    sizes = replace(sizes, seconds=options.seconds or sizes.seconds)
    suite = _start(sizes, torch.device("cpu" if options.rehearse else "cuda:0"), options.out, options.commit)
    suite.report.steps = [step for step in STEPS if step in options.steps]
    suite = _run(suite)
    page = suite.report.write()
    verdict = "red or failed" if suite.report.red or suite.report.failures else "green"
    print(f"{REHEARSAL + ': ' if suite.report.is_rehearsal else ''}{verdict}; {page} and .json written")
    return int(verdict != "green")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_suite", description=benchmarks.gpu_suite.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the two files go")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and repeats, 8 minutes")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="only these; correctness always runs")
    parser.add_argument("--seconds", type=float, help="time budget instead of the size's own")
    parser.add_argument("--commit", help="what the tree is, where it has no history")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.steps = {"correctness", *options.steps}
    return options


def _start(sizes: Sizes, device: torch.device, folder: Path, commit: str | None) -> Suite:
    budget = Budget(sizes.seconds)
    return Suite(device, sizes, budget, Report(gather_facts(device, commit), sizes.name, budget, folder))


def _run(suite: Suite) -> Suite:
    """The steps that were asked for, in order; on a GPU each job in a process of its own."""
    for step in suite.report.steps:
        for job in jobs_of(step, suite.sizes):
            if step not in UNTIMED and not suite.timed:
                suite.budget.skip(job.what, "no backend is green")
            elif suite.is_rehearsal:
                run_here(suite, job)
            else:
                suite = run_apart(suite, job)
            suite.report.write()
    return suite


if __name__ == "__main__":
    sys.exit(main())
