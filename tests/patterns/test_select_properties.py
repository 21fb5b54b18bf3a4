"""Any prompt, plans and ranks: what is sparse has the recall it reports, by the oracle's mask, and enough of it."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.catalog import Dense
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.select import auto_select, select
from sglang_mm.patterns.select.probe import probe_range
from tests.patterns.naive import probabilities, recall
from tests.patterns.ranks import random_shards, spread
from tests.patterns.strategies import head_plans, maps

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
UNITS = [(0, 1), (2,), (3,)]


def check(function, tokens, ranks, theta):
    """One rank against the oracle; all ranks against one."""
    draw = torch.Generator().manual_seed(0)
    q, k = (1.5 * torch.randn(len(tokens), heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2))
    ((selection, report),) = spread(function, q, k, tokens, [torch.arange(len(tokens))])
    assert [unit.heads for unit in selection.units] == UNITS
    assert all(unit_mask(unit, tokens).diagonal().all() for unit in selection.units)
    for verdict in report.verdicts:
        unit = selection.units[UNITS.index(verdict.heads)]
        kept = tuple((panel.keys, panel.pattern) for panel in unit.panels if panel.rows == verdict.rows)
        assert kept == verdict.kept and verdict.is_sparse == any(type(each) is not Dense for _, each in kept)
        if verdict.is_sparse:
            rows = probe_range(tokens, verdict.rows, range(len(tokens)))
            true = recall(probabilities(q, k, rows), rows, unit, tokens)
            assert verdict.recall == pytest.approx(true, abs=1e-12) and verdict.recall >= theta - 1e-12
    for other, told in spread(function, q, k, tokens, random_shards(len(tokens), ranks, seed=1)):
        assert other.digest() == selection.digest()
        assert told.densities == pytest.approx(report.densities)
        assert [verdict.kept for verdict in told.verdicts] == [verdict.kept for verdict in report.verdicts]


def select_here(plans, theta, q, k, rows, keys, peers):
    return select(list(zip(UNITS, plans)), q, k, rows, keys, scale=1.0, theta=theta, peers=peers)


@settings(deadline=None, max_examples=30)
@given(st.data(), maps, st.integers(1, 4), st.sampled_from([0.1, 0.6, 0.95, 1.0]))
def test_planned(data, tokens, ranks, theta):
    plans = [data.draw(head_plans) for _ in UNITS]
    check(partial(select_here, plans, theta), tokens, ranks, theta)


def auto_here(theta, q, k, rows, keys, peers):
    return auto_select(UNITS, 2, q, k, rows, keys, scale=1.0, theta=theta, peers=peers)


@settings(deadline=None, max_examples=15)
@given(maps, st.integers(1, 4), st.sampled_from([0.1, 0.95, 1.0]))
def test_auto(tokens, ranks, theta):
    check(partial(auto_here, theta), tokens, ranks, theta)
