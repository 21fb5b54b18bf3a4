"""The table of targets: which figure of which rows counts, and what is said where there is none."""

from benchmarks.gpu_suite.report import Measurement
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.targets import verdicts
from benchmarks.gpu_suite.timing import Timing


def sparse_row(point, aim, backend, seconds, **figures):
    where = {"point": point.name, "aim": aim, "backend": backend}
    return Measurement("sparse", where, Timing(seconds, seconds, seconds, 3), figures)


def test_targets_are_held_against_the_worst_of_what_they_are_about():
    long, short = Point(2**20), Point(2**17)
    dense = {"dense": "FA3", "dense TFLOP/s": 612.0, "density": 0.021}
    rows = [
        sparse_row(
            long, "2 %", "triton", 0.4, **{"tiles a row": 80.0, "of the dense rate": 0.7, "times dense": 33.0}, **dense
        ),
        sparse_row(long, "10 %", "triton", 2.0, **{"tiles a row": 400.0, "of the dense rate": 0.6, "times dense": 7.0}),
        sparse_row(long, "2 %", "fa4", 0.5, **{"tiles a row": 80.0, "times dense": 26.0, "beside the kernel": 0.5}),
        sparse_row(short, "5 %", "triton", 0.1, **{"tiles a row": 30.0, "of the dense rate": 0.1, "times dense": 14.9}),
        sparse_row(long, "5 %", "triton", 1.0, **{"tiles a row": 200.0, "beside the kernel": 0.04}),
    ]
    found = {each.what: each for each in verdicts(rows)}
    got = [(each.value, each.verdict) for each in found.values()]
    assert got == [
        ("0.6", "NOT met"), ("", "not measured"), ("0.04", "met"), ("", "not measured"), ("14.9", "NOT met"),
        ("33", "met"), ("", "not measured"),
    ]  # fmt: skip
    where = found["attention at 1M and 2 %, times dense"].where
    assert where == "1M tokens, 28/4 heads, 2 %, triton, density 2.1 %, dense: FA3 at 612 TFLOP/s"
