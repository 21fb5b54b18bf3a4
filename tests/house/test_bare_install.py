"""Without SGLang and the other extras: kernels, parallel and modality work, and the launcher says what is missing."""

import subprocess

import pytest

from tests.house.bare import make_environment

ABSENT = ["sglang", "transformers", "av", "decord", "torchcodec", "openai", "requests", "fastapi", "ray", "pytest"]

NOTHING_ELSE_IS_THERE = f"""
import importlib
for name in {ABSENT}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == name
    else:
        raise SystemExit(f"{{name}} is installed here")
"""

IMPORTS = """
import importlib, pkgutil
import sglang_mm, sglang_mm.types, sglang_mm.launch.__main__
for room in ("kernels", "parallel", "modality", "events"):
    package = importlib.import_module(f"sglang_mm.{room}")
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
"""

ATTENTION = """
import torch
from sglang_mm.kernels import causal_attention
torch.manual_seed(0)
keys, heads, dim, scale = 64, 4, 16, 0.25
q, k, v = torch.randn(3, keys, heads, dim, dtype=torch.float64)
hidden = torch.ones(keys, keys, dtype=torch.bool).triu(1)
scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, float("-inf"))
expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
order = torch.arange(keys)
out, lse = causal_attention(q, k, v, order, order, scale=scale)
# a score is a sum of dim products, off by dim + 1 roundings of their magnitudes; a weight is off by twice that and by
# the sum over its row, an output by another such sum; and two computations are compared
eps = torch.finfo(torch.float64).eps
score = (dim + 1) * eps * scale * torch.einsum("qhd,khd->hqk", q.abs(), k.abs()).max()
allowed = 2 * (2 * score + 2 * keys * eps) * v.abs().max().clamp(min=1)
assert (out - expected).abs().max() <= allowed, (out - expected).abs().max()
assert (lse - scores.logsumexp(-1)).abs().max() <= allowed, (lse - scores.logsumexp(-1)).abs().max()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("bare") / "environment")


def run(python, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-I", *arguments], capture_output=True, text=True, timeout=120)


def test_rooms_work_with_the_core_dependencies_alone(python):
    done = run(python, "-c", NOTHING_ELSE_IS_THERE + IMPORTS + ATTENTION)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_sglang(python):
    done = run(python, "-m", "sglang_mm.launch", "--help")
    assert done.returncode == 0 and "--cp C" in done.stdout


def test_launch_says_that_sglang_is_missing(python):
    done = run(python, "-m", "sglang_mm.launch", "--model-path", "M", "--cp", "2")
    message = "sglang_mm: SGLang is not installed. Remedy: pip install sglang==0.5.23\n"
    assert (done.returncode, done.stderr) == (1, message)
