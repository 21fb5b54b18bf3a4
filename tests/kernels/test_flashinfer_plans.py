"""FlashInfer's backend: its calls and their limits, plans that are used again, and what it says it cannot run."""

import importlib.util
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import flashinfer_backend
from sglang_mm.kernels.flashinfer_backend import attend, forget_plans, plan, plan_cache, unfit
from sglang_mm.kernels.merge import empty_state
from sglang_mm.kernels.problem import Problem
from tests.exactness.layers import SCALE
from tests.kernels.flashinfer_cases import HAND_WRITTEN, attended, decoded, draw, seen_by_head
from tests.kernels.flashinfer_twin import Twin, put_in_place

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
GROUPS, DUPLICATES = HAND_WRITTEN["groups of heads, ragged tiles"], HAND_WRITTEN["one tile in several entries"]


@pytest.fixture
def ran(monkeypatch):
    """What the library's kernels were given, call by call."""
    return put_in_place(monkeypatch, Twin).ran


def test_one_call_of_each_kind(ran):
    program = GROUPS
    attended(program, *draw(program, torch.bfloat16))
    assert [paged.mask is None for paged in ran] == [True, False]
    assert {paged.out_dtype for paged in ran} == {torch.bfloat16}, "the library writes float16 unless told otherwise"
    full, masked = (paged.page_ptr.diff().tolist() for paged in ran)
    assert full == [1, 1, 1]  # heads 2 and 3 of the first item, head 0
    assert masked == [2, 2, 3, 3, 2, 3], "the ragged tiles of full entries are here"


def test_a_tile_stands_in_the_list_as_often_as_it_has_entries(ran):
    program = DUPLICATES
    attended(program, *draw(program, torch.float16))
    assert [paged.pages.tolist() for paged in ran] == [[1, 0, 0, 3, 3, 3]]


@pytest.mark.parametrize("limit", [{"CALL_ROWS": 100}, {"CALL_PAGES": 3}, {"CALL_MASK_BYTES": 1000}], ids=str)
def test_limits_of_a_call(ran, monkeypatch, limit):
    program = GROUPS
    whole = attended(program, *draw(program, torch.bfloat16))
    calls = len(ran)
    forget_plans()
    ran.clear()
    for name, value in limit.items():
        monkeypatch.setattr(plan, name, value)
    assert torch.equal(decoded(program, ran), seen_by_head(program).byte())
    ran.clear()
    assert all(map(torch.equal, attended(program, *draw(program, torch.bfloat16)), whole))
    assert len(ran) > calls
    for paged in ran:
        one = len(paged.page_ptr) == 2
        assert one or len(paged.q) <= plan.CALL_ROWS
        assert one or len(paged.pages) <= plan.CALL_PAGES
        assert one or paged.mask is None or paged.mask.nbytes <= plan.CALL_MASK_BYTES


def test_too_many_masks_are_refused(monkeypatch):
    put_in_place(monkeypatch, Twin)
    monkeypatch.setattr(plan, "PLAN_MASK_BYTES", 1 << 10)
    program = GROUPS
    with pytest.raises(ConfigError, match=r"MiB of masks.*triton backend"):
        attended(program, *draw(program, torch.bfloat16))


def test_more_blocks_than_the_library_counts_are_refused(monkeypatch):
    put_in_place(monkeypatch, Twin)
    program = GROUPS
    monkeypatch.setattr(plan, "INT32", 7)
    with pytest.raises(ConfigError, match=r"2 K/V heads of 4 key tiles.*blocks in flashinfer"):
        attended(program, *draw(program, torch.bfloat16))
    monkeypatch.setattr(plan, "INT32", 300)
    with pytest.raises(ConfigError, match=r"an item of 3 tiles with 32 keys and 128 bytes of mask"):
        attended(program, *draw(program, torch.bfloat16))


def test_a_library_that_keeps_its_offsets_elsewhere_is_refused(monkeypatch):
    class Newer(Twin):
        def plan(self, *given, **how):
            super().plan(*given, **how)
            del self._mask_indptr_buf

    put_in_place(monkeypatch, Newer)
    program = DUPLICATES
    with pytest.raises(ConfigError, match=r"offsets of packed masks elsewhere.*0\.7\.2"):
        attended(program, *draw(program, torch.bfloat16))


def test_plans_are_used_again_while_tables_are_equal(monkeypatch):
    library = put_in_place(monkeypatch, Twin)
    program = GROUPS
    q, k, v = draw(program, torch.bfloat16)
    same = replace(program, rows=program.rows.clone(), bounds=program.bounds.clone())
    for each in (program, program, same):
        attend(q, k, v, each, SCALE, *empty_state(q))
    assert len(library.made) == 2 and len(library.ran) == 6
    bounds = program.bounds.clone()
    bounds[0, 0] += 1
    attend(q, k, v, replace(program, bounds=bounds), SCALE, *empty_state(q))
    attend(q, k, v, program, 2 * SCALE, *empty_state(q))
    attend(q.half(), k.half(), v.half(), program, SCALE, *empty_state(q))
    assert len(library.made) == 8 and all(wrapper.plans == 1 for wrapper in library.made)


def test_plans_are_bounded(monkeypatch):
    library = put_in_place(monkeypatch, Twin)
    program = DUPLICATES
    q, k, v = draw(program, torch.bfloat16)
    monkeypatch.setattr(plan_cache, "PLANS", 3)
    for scale in (1, 2, 3, 1, 4, 1, 2):  # 4 takes the place of 2
        attend(q, k, v, program, scale, *empty_state(q))
    assert len(library.made) == 5
    forget_plans()
    monkeypatch.setattr(plan_cache, "HELD_BYTES", 2 * plan.WRAPPER_BYTES)
    for scale in (1, 2, 3):
        attend(q, k, v, program, scale, *empty_state(q))
        assert plan.WRAPPER_BYTES < plan_cache.held_bytes() < 2 * plan.WRAPPER_BYTES


def test_programs_are_not_kept_alive(monkeypatch):
    put_in_place(monkeypatch, Twin)
    program = replace(DUPLICATES)
    known = len(plan_cache._digests)
    attended(program, *draw(program, torch.bfloat16))
    assert len(plan_cache._digests) == known + 1
    del program
    assert len(plan_cache._digests) == known


PROBLEM = Problem(
    device=torch.device("cuda", 0), capability=90, dtype=torch.bfloat16, heads=8, kv_heads=2, head_dim=128,
    rows=100, keys=100, items=10, entries=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": torch.device("cpu"), "capability": 0}, "cpu: FlashInfer needs a CUDA device of sm_80"),
        ({"capability": 75}, "sm_75: FlashInfer needs"),
        ({"dtype": torch.float32}, "torch.float32: FlashInfer takes float16 and bfloat16"),
        ({"head_dim": 80}, "head_dim 80: FlashInfer takes 64, 128, 256"),
    ],
)
def test_what_it_cannot_run(change, why):
    assert unfit(replace(PROBLEM, **change)).startswith(why)


def test_why_there_is_no_library(monkeypatch):
    found = {"flashinfer": True, "flashinfer_jit_cache": None}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    monkeypatch.setattr(flashinfer_backend.shutil, "which", lambda _: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(flashinfer_backend.Path, "exists", lambda _: False)
    assert "neither nvcc nor flashinfer-jit-cache" in unfit(PROBLEM)
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    monkeypatch.setattr(flashinfer_backend, "_import_failure", lambda: None)
    assert unfit(PROBLEM) is None
    found["flashinfer"] = None
    assert unfit(PROBLEM) == "flashinfer is not installed"


def test_the_installed_library_is_as_expected():
    """It can be imported without a GPU, takes our arguments, and has the defaults of the twin."""
    flashinfer = pytest.importorskip("flashinfer")
    assert flashinfer_backend._import_failure() is None
    for name in ("plan", "run"):
        real = inspect.signature(getattr(flashinfer.BlockSparseAttentionWrapper, name)).parameters
        for each in inspect.signature(getattr(Twin, name)).parameters.values():
            assert real[each.name].default == each.default and real[each.name].kind == each.kind


def test_masks_are_laid_out_as_the_library_does_it(ran):
    """Its own steps from `mask` [pages, R, C] to what its kernels get, but for the packing, which needs a GPU."""
    sparse = pytest.importorskip("flashinfer").sparse
    attended(GROUPS, *draw(GROUPS, torch.bfloat16))
    paged = ran[1]
    seen = [each.unflatten(1, (-1, paged.size)).transpose(0, 1) for *_, each in paged.requests()]
    in_rows = sparse.convert_bsr_mask_layout(torch.cat(seen), paged.page_ptr)
    assert np.array_equal(np.packbits(in_rows.numpy(), bitorder="little"), paged.mask.numpy())
    whole_pages = torch.full((len(seen),), paged.size, dtype=torch.int32)
    bits = sparse._compute_page_mask_indptr(paged.q_ptr, paged.page_ptr, whole_pages, paged.size)
    assert torch.equal(bits, paged.mask_ptr * 8)
