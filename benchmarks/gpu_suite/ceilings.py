"""What this device does at best, measured: bytes copied per second, and operations of a large matrix product."""

import torch

from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.timing import measure

COPY, MATMUL = "copy", "bf16 matmul"


def measure_ceilings(suite: Suite) -> None:
    _measure_copy(suite)
    suite.free()
    _measure_matmul(suite)


def _measure_copy(suite: Suite) -> None:
    draw = torch.Generator(suite.device).manual_seed(0)
    source = torch.randn(suite.sizes.copy_mb * 2**18, device=suite.device, generator=draw)
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source), suite.device, suite.sizes.repeat_s)
    suite.ceilings[COPY] = 2 * source.nbytes / seconds.median
    where = {"what": COPY, "size": f"{source.nbytes / 1e9:.3g} GB"}
    suite.report.add("ceilings", where, seconds, **{"TB/s read + written": suite.ceilings[COPY] / 1e12})


def _measure_matmul(suite: Suite) -> None:
    draw = torch.Generator(suite.device).manual_seed(0)
    side = suite.sizes.matmul
    left, right = torch.randn(2, side, side, device=suite.device, generator=draw).bfloat16()
    seconds = measure(lambda: left @ right, suite.device, suite.sizes.repeat_s)
    suite.ceilings[MATMUL] = 2 * side**3 / seconds.median
    where = {"what": MATMUL, "size": f"{side} x {side} x {side}"}
    suite.report.add("ceilings", where, seconds, **{"TFLOP/s": suite.ceilings[MATMUL] / 1e12})
