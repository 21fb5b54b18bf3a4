"""The suite from its command line, on a CPU: every step at toy sizes, with torch and triton alone."""

import json
import subprocess
import sys

import pytest
import torch

from tests.house.source import ROOT

BEYOND_TORCH = ["msgspec", "zmq", "numpy", "sglang", "transformers", "matplotlib", "flashinfer", "flash_attn", "tests"]
WITHOUT = f"""
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BEYOND_TORCH}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["gpu_suite", *sys.argv[1:]]
try:
    runpy.run_module("benchmarks.gpu_suite", run_name="__main__", alter_sys=True)
finally:
    here = [name for name in {BEYOND_TORCH} if name in sys.modules]
    assert not here, here
    from sglang_mm.errors import ConfigError
    from sglang_mm.patterns.catalog import AShape, Grid
    assert (repr(AShape()), AShape() == AShape(window=9)) == ("AShape(sink=128, window=4096)", False)
    for make in (lambda: AShape(window=0), lambda: Grid(vertical=False)):
        try:
            make()
            raise SystemExit("a pattern that cannot be was made")
        except ConfigError as error:
            print(error.given)
"""


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "benchmarks.gpu_suite"]
    return subprocess.run([sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(what was printed, the folder)."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run("--rehearse", "--out", str(folder), code=WITHOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_every_step_runs_with_torch_and_triton_alone(rehearsal):
    printed, folder = rehearsal
    found = json.loads((folder / "rehearsal.json").read_text())
    assert [each["step"] for each in found["measurements"]].count("sparse") == 4
    steps = ["correctness", "ceilings", "sparse", "ring", "model", "decode", "paged"]
    assert found["steps"] == steps
    assert {each["step"] for each in found["measurements"]} == {*steps[1:], "dense"}
    assert (found["failures"], found["skipped"]) == ([], [])
    assert printed.splitlines()[-2:] == ["window: 0 in AShape", "vertical, horizontal, slash: none in Grid"]


def test_the_reference_is_green_and_kernels_say_why_they_are_not(rehearsal):
    checks = json.loads((rehearsal[1] / "rehearsal.json").read_text())["checks"]
    statuses = {
        name: {each["status"] for each in checks if each["backend"] == name} for name in ("reference", "triton")
    }
    assert statuses == {"reference": {"green"}, "triton": {"unfit"}}
    assert all(each["why"] for each in checks if each["status"] == "unfit")
    assert {each["backend"] for each in checks} >= {"merge", "probe", "paged", "dense SDPA", "reference in fp64", "fa4"}


def test_a_rehearsal_cannot_be_taken_for_a_result(rehearsal):
    printed, folder = rehearsal
    assert sorted(path.name for path in folder.iterdir()) == ["rehearsal.json", "rehearsal.md"]
    assert (folder / "rehearsal.md").read_text().startswith("# Rehearsal, no measurement\n")
    assert json.loads((folder / "rehearsal.json").read_text())["kind"] == "rehearsal, no measurement"
    assert "rehearsal, no measurement: green" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    done = run("--out", str(tmp_path / "results"))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "finds no CUDA device. Remedy: " in done.stderr
    assert list(tmp_path.iterdir()) == []
