"""The step for keys in pages: its tables, and that a fault in the kernel is red and not timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_suite import paged_decode, small_kernels
from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.facts import gather_facts
from benchmarks.gpu_suite.paged_decode import pool_slots, shuffled_pages, time_paged
from benchmarks.gpu_suite.report import Report
from benchmarks.gpu_suite.sizes import REHEARSAL, Point
from benchmarks.gpu_suite.small_kernels import check_small_kernels
from benchmarks.gpu_suite.suite import Suite
from sglang_mm.kernels import paged_attention
from sglang_mm.types import Residence

CPU = torch.device("cpu")
POINT = Point(280, heads=4, kv_heads=2)
"""Rank 0 keeps the last token, with pages of 64: 280 % 64 is less than 32."""


@pytest.fixture
def suite(tmp_path):
    sizes, budget = replace(REHEARSAL, check_dtypes=(torch.bfloat16,)), Budget(60)
    return Suite(CPU, sizes, budget, Report(gather_facts(CPU, "abc"), "rehearsal", budget, tmp_path))


def one_token_less(q, k_pool, v_pool, table, *, backend, **how):
    if backend != "reference":
        lengths = [max(0, int(length) - 1) for length in table.lengths_cpu]
        table = replace(table, lengths_cpu=lengths, lengths=torch.tensor(lengths))
    return paged_attention(q, k_pool, v_pool, table, backend=backend, **how)


def test_pages_are_whole_and_shuffled():
    table = shuffled_pages([150, 0, 64, 3], Residence(2, 1, 64), CPU)
    assert table.slots.shape == (4, 192) and pool_slots(table) == 6 * 32
    first = [int(page) for row, pages in ((0, 3), (2, 1), (3, 1)) for page in table.slots[row, : 64 * pages : 64]]
    assert sorted(first) == [64, 128, 192, 256, 320] != first
    assert torch.equal(table.slots[0, 64:128], first[1] + torch.arange(64).int())


def test_what_is_right_is_timed(suite):
    time_paged(suite, POINT)
    assert [check.status for check in suite.report.checks] == ["green"] * 2
    assert [each.where["C"] for each in suite.report.measurements] == [1, 2]
    assert all(each.figures["TB/s of K/V"] > 0 for each in suite.report.measurements)


def test_a_lost_token_is_red_and_not_timed(suite, monkeypatch):
    for module in (paged_decode, small_kernels):
        monkeypatch.setattr(module, "paged_attention", one_token_less)
    time_paged(suite, POINT)
    assert [check.status for check in suite.report.checks] == ["red"] * 2 and not suite.report.measurements
    check_small_kernels(suite)
    found = {check.backend: check.status for check in suite.report.checks}
    assert found == {"paged": "red", "merge": "green", "probe": "green"}
