"""Which backend runs where, and what is said of those passed over."""

import re
import sys
from dataclasses import replace
from math import log

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import choose_backend, empty_state, fa4_backend, problem_of, sparse_attention, sparse_lse
from sglang_mm.kernels.problem import Problem
from sglang_mm.kernels.selector import BACKENDS
from sglang_mm.kernels.tiles import attend_tiles, tile_lse
from sglang_mm.kernels.triton_backend import launch
from tests.exactness.layers import SCALE
from tests.kernels.test_tiles import TWO_UNITS, draw

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
CUDA = torch.device("cuda", 0)
H100 = Problem(CUDA, 90, torch.bfloat16, 28, 4, 128, rows=8192, keys=8192, items=64, entries=400, full_entries=200)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
        (torch.float64, "reference; not cpu: computes in float32, and float64 stays with the reference"),
    ],
    ids=str,
)
def test_on_cpu(dtype, text):
    assert str(choose_backend(problem_of(*draw(3, 1, dtype)[:2], TWO_UNITS))) == text


def test_fa4_first_on_hopper():
    pytest.importorskip("flash_attn.cute")
    assert str(choose_backend(H100)) == "fa4"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"capability": 80},
            "triton; not fa4: needs sm_90, not sm_80: there FA4 takes block lists and",
        ),
        ({"capability": 120}, "triton; not fa4: needs sm_90, not sm_120"),
        (
            {"head_dim": 33},
            "reference; not fa4: takes head dims .* not 33; not triton: takes head dims .* not 33; ",
        ),
        ({"dtype": torch.float32}, "triton; not fa4: takes float16 and bfloat16, not torch.float32"),
        ({"full_entries": 3}, "triton; not fa4: the program has fewer full entries than items"),
        ({"dtype": torch.float64}, "reference; not fa4: .*; not triton: does not take torch.float64; not flashinfer: "),
        ({"capability": 75}, "reference; not fa4: .*; not triton: needs sm_80 or later, not sm_75; not flashinfer: "),
    ],
    ids=lambda value: str(*value.items()) if isinstance(value, dict) else "",
)
def test_what_is_passed_over_and_why(change, text, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert re.match(text, str(choose_backend(replace(H100, **change))))


def test_an_absent_library_is_a_reason_and_the_next_backend(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    clear_caches()
    try:
        choice = choose_backend(H100)
        assert choice.backend == "triton" and "flash-attn-4" in str(choice)
        with pytest.raises(ConfigError, match=r"backend 'fa4'.*flash-attn-4.*pass backend='auto'"):
            choose_backend(H100, "fa4")
    finally:
        clear_caches()


def clear_caches() -> None:
    fa4_backend._library.cache_clear()
    fa4_backend._import_failure.cache_clear()


def test_what_was_asked_for_and_cannot_run_is_refused():
    problem = problem_of(*draw(3, 1)[:2], TWO_UNITS)
    with pytest.raises(ConfigError, match=r"backend 'triton': needs a CUDA device, not cpu.*TRITON_INTERPRET=1"):
        choose_backend(problem, "triton")
    with pytest.raises(ConfigError, match=r"backend 'cuda_magic'.*auto, fa4, triton, flashinfer, cpu, reference"):
        choose_backend(problem, "cuda_magic")
    with pytest.raises(ConfigError, match=r"backend 'cpu': runs on CPU, not on cuda:0"):
        choose_backend(H100, "cpu")
    assert set(BACKENDS) == {"fa4", "triton", "flashinfer", "cpu", "reference"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_programs_are_added_to_the_state(dtype):
    """Two programs that show the same keys: each key counts twice, so lse grows by log 2 and out stays."""
    q, k, v = draw(3, 1, dtype)
    want, lse_want = attend_tiles(q, k, v, TWO_UNITS, scale=SCALE)
    how = {"scale": SCALE, "backend": "reference"}
    out, lse = sparse_attention(q, k, v, [TWO_UNITS, TWO_UNITS], **how)
    eps = torch.finfo(out.dtype).eps
    assert (out - want).abs().max() <= 4 * eps * want.abs().max()
    assert (lse - lse_want - log(2))[lse_want.isfinite()].abs().max() <= 8 * eps * 2
    state = empty_state(q)
    assert sparse_attention(q, k, v, [TWO_UNITS], **how, state=state) == state, "in place"
    assert torch.equal(state[0], want) and torch.equal(state[1], lse_want)
    assert torch.equal(sparse_lse(q, k, [TWO_UNITS], scale=SCALE), tile_lse(q, k, TWO_UNITS, scale=SCALE))


@pytest.mark.parametrize(
    ("out", "lse", "scale", "message"),
    [
        ((4, 3, 8), (4, 3), 0.3, r"\(4, 3, 8\).*\(4, 3\).*contiguous.*\(3, 4\).*empty_state"),
        ((4, 2, 8), (3, 4), 0.3, r"\(4, 2, 8\)"),
        ((4, 3, 8), (3, 4), 0.0, "scale 0.0.*above 0"),
        ((4, 3, 8), (3, 4), float("nan"), "scale nan.*above 0"),
    ],
)
def test_states_that_do_not_fit_are_refused(out, lse, scale, message):
    q, k, v = draw(3, 1, torch.float32)
    with pytest.raises(ConfigError, match=message):
        sparse_attention(q, k, v, [TWO_UNITS], scale=scale, state=(torch.zeros(out), torch.zeros(lse)))


def test_a_state_of_another_dtype_or_order_is_refused():
    q, k, v = draw(3, 1, torch.bfloat16)
    out, lse = empty_state(q)
    for state in ((out.double(), lse.double()), (out.transpose(1, 2).contiguous().transpose(1, 2), lse)):
        with pytest.raises(ConfigError, match="contiguous"):
            sparse_attention(q, k, v, [TWO_UNITS], scale=SCALE, state=state)
