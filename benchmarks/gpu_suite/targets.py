"""What the figures are held against: each target with what was measured of it in this run, at its worst.

Targets are for one NVIDIA H200 and dense attention of FlashAttention-3's class; which baseline it was, and its rate,
stand beside the value.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from benchmarks.gpu_suite.timing import Timing

MET, NOT_MET, NOT_MEASURED = "met", "NOT met", "not measured"
FEW_TILES = 64
"""Tiles of 128 keys that a row meets on average: from there on a kernel's rate is its own, not that of its borders."""


class Measured(Protocol):
    """A `report.Measurement`."""

    step: str
    where: Mapping[str, object]
    seconds: Timing | None
    figures: Mapping[str, object]


class Target(NamedTuple):
    """rows: of the measurements, those it is about; value: of each. The worst counts."""

    what: str
    bound: float
    is_least: bool
    rows: Callable[[Sequence[Measured]], Iterable[Measured]]
    figure: str


class Verdict(NamedTuple):
    what: str
    target: str
    value: str
    verdict: str
    where: str


def verdicts(measurements: Sequence[Measured]) -> list[Verdict]:
    return [_verdict(target, measurements) for target in TARGETS]


def _verdict(target: Target, measurements: Sequence[Measured]) -> Verdict:
    rows = [row for row in target.rows(measurements) if target.figure in row.figures]
    wanted = f"{'>=' if target.is_least else '<='} {target.bound:g}"
    if not rows:
        return Verdict(target.what, wanted, "", NOT_MEASURED, "")
    worst = (min if target.is_least else max)(rows, key=lambda row: row.figures[target.figure])
    value = float(worst.figures[target.figure])
    is_met = value >= target.bound if target.is_least else value <= target.bound
    return Verdict(target.what, wanted, f"{value:.3g}", MET if is_met else NOT_MET, _circumstances(worst))


def _circumstances(row: Measured) -> str:
    parts = [str(value) for value in row.where.values()]
    if "density" in row.figures:
        parts.append(f"density {100 * row.figures['density']:.1f} %")
    if "dense TFLOP/s" in row.figures:
        parts.append(f"dense: {row.figures['dense']} at {row.figures['dense TFLOP/s']:.0f} TFLOP/s")
    if "dense is" in row.figures:
        parts.append(f"dense is {row.figures['dense is']}")
    return ", ".join(parts)


def _rates(backend: str) -> Callable[[Sequence[Measured]], list[Measured]]:
    def rows(measurements: Sequence[Measured]) -> list[Measured]:
        timed = [each for each in measurements if each.step == "sparse" and each.where["backend"] == backend]
        return [each for each in timed if each.figures.get("tiles a row", 0) >= FEW_TILES]

    return rows


def _fastest(length: str, aims: Sequence[str] = ()) -> Callable[[Sequence[Measured]], list[Measured]]:
    """Of each density at this length, the fastest backend. aims: of these densities alone."""

    def rows(measurements: Sequence[Measured]) -> list[Measured]:
        best: dict[object, Measured] = {}
        for each in measurements:
            if each.step == "sparse" and str(each.where["point"]).startswith(f"{length} tokens"):
                aim = each.where["aim"]
                if (not aims or aim in aims) and (aim not in best or each.seconds.median < best[aim].seconds.median):
                    best[aim] = each
        return list(best.values())

    return rows


def _models(tokens: int, aim: str) -> Callable[[Sequence[Measured]], list[Measured]]:
    return lambda measurements: [
        each
        for each in measurements
        if each.step == "model" and (each.where["tokens"], each.where["aim"]) == (tokens, aim)
    ]


RATE = "kernel's rate as a share of the dense one, {} or more tiles a row: "
TARGETS = (
    Target(RATE.format(FEW_TILES) + "triton", 0.65, True, _rates("triton"), "of the dense rate"),
    Target(RATE.format(FEW_TILES) + "fa4", 0.90, True, _rates("fa4"), "of the dense rate"),
    Target("all beside the kernel, share of attention at 1M", 0.05, False, _fastest("1M"), "beside the kernel"),
    Target("attention at 32K, times dense", 1.0, True, _fastest("32K"), "times dense"),
    Target("attention at 128K and 5 %, times dense", 15.0, True, _fastest("128K", ["5 %"]), "times dense"),
    Target("attention at 1M and 2 %, times dense", 30.0, True, _fastest("1M", ["2 %"]), "times dense"),
    Target("prefill of a model at 1M and 2 %, times dense", 10.0, True, _models(1 << 20, "2 %"), "times dense"),
)
