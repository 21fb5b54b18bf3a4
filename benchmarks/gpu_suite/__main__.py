"""See the package's docstring: python -m benchmarks.gpu_suite --out DIR [--quick]

Exit status: 0 all green, 1 something is red or failed, 2 there is no CUDA device.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import benchmarks.gpu_suite
from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.ceilings import measure_ceilings
from benchmarks.gpu_suite.correctness import check_backends
from benchmarks.gpu_suite.decode_graph import time_decode
from benchmarks.gpu_suite.dense import Attend, check_dense
from benchmarks.gpu_suite.facts import gather_facts
from benchmarks.gpu_suite.model import time_model
from benchmarks.gpu_suite.report import REHEARSAL, Report
from benchmarks.gpu_suite.ring import time_ring
from benchmarks.gpu_suite.sizes import FULL, QUICK, Sizes
from benchmarks.gpu_suite.sizes import REHEARSAL as TOY
from benchmarks.gpu_suite.small_kernels import check_small_kernels
from benchmarks.gpu_suite.sparse import time_sparse
from benchmarks.gpu_suite.suite import Suite
from sglang_mm.kernels.selector import BACKENDS

STEPS = ("correctness", "ceilings", "sparse", "ring", "model", "decode")
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
    _run(suite)
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
    torch.backends.cuda.matmul.allow_tf32 = False  # the oracle's products; kernels say for themselves what they use
    budget = Budget(sizes.seconds)
    return Suite(device, sizes, budget, Report(gather_facts(device, commit), sizes.name, budget, folder))


def _run(suite: Suite) -> None:
    """The steps that were asked for, in order. One that fails is reported, and the next one runs."""
    attends: dict[str, Attend] = {}

    def correctness():
        check_backends(suite, BACKENDS)
        check_small_kernels(suite)
        attends.update(check_dense(suite))

    steps: dict[str, Callable[[], None]] = {
        "correctness": correctness,
        "ceilings": lambda: measure_ceilings(suite),
        "sparse": lambda: time_sparse(suite, BACKENDS, attends),
        "ring": lambda: time_ring(suite, suite.fastest),
        "model": lambda: time_model(suite, suite.fastest, attends),
        "decode": lambda: time_decode(suite),
    }
    for name in suite.report.steps:
        if name not in ("correctness", "ceilings") and not suite.timed:
            suite.budget.skip(name, "no backend is green")
            continue
        try:
            steps[name]()
        except Exception as error:  # any: what was measured so far is kept
            traceback.print_exc()
            suite.report.fail(name, error)
        suite.free()
        suite.report.write()


if __name__ == "__main__":
    sys.exit(main())
