"""The steps, each in jobs that can be run apart."""

from functools import partial

from benchmarks.gpu_suite.apart import Job
from benchmarks.gpu_suite.ceilings import measure_ceilings
from benchmarks.gpu_suite.correctness import check_backends
from benchmarks.gpu_suite.decode_graph import time_decode
from benchmarks.gpu_suite.dense import check_dense
from benchmarks.gpu_suite.model import time_model
from benchmarks.gpu_suite.paged_decode import time_paged
from benchmarks.gpu_suite.ring import time_ring
from benchmarks.gpu_suite.sizes import Sizes
from benchmarks.gpu_suite.small_kernels import check_small_kernels
from benchmarks.gpu_suite.sparse import time_sparse

STEPS = ("correctness", "ceilings", "sparse", "ring", "model", "decode", "paged")
UNTIMED = ("correctness", "ceilings", "paged")
"""Steps that need no green backend: nothing is timed, or what is has checks of its own."""


def jobs_of(step: str, sizes: Sizes) -> list[Job]:
    """In order, shortest prompts first."""
    match step:
        case "correctness":
            checks = {"backends": check_backends, "small kernels": check_small_kernels, "dense baselines": check_dense}
            return [Job(f"correctness of {what}", run) for what, run in checks.items()]
        case "ceilings":
            return [Job(step, measure_ceilings)]
        case "model":
            return [
                Job(f"model of {tokens} tokens", partial(time_model, tokens=tokens)) for tokens in sizes.model_tokens
            ]
    run, points = {
        "sparse": (time_sparse, sizes.points),
        "ring": (time_ring, sizes.ring),
        "decode": (time_decode, sizes.decode),
        "paged": (time_paged, sizes.decode),
    }[step]
    return [Job(f"{step}, {point.name}", partial(run, point=point)) for point in points]
