"""The schedule `gather` over threads equals dense attention and the ring, and the comparison notices a broken one."""

import threading
import time
from functools import cache

import pytest
import torch

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.parallel import pieces
from sglang_mm.parallel.gather import GatherTables, attend_gathered, head_stages
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.types import BatchLayout, Layout, Run
from tests.parallel.prompts import (
    CACHED,
    ONE_CACHED,
    SHORT,
    assert_ring_equals_dense,
    batch,
    gathered_attention,
    make_prompts,
    mixed,
    ring_attention,
    ring_errors,
)

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
RANKS = range(1, 9)
HEADS = [(3, 3, 20), (8, 2, 16), (7, 1, 24)]  # 1, 4 and 7 query heads per K/V head


@cache
def answers(ranks: int):
    """(prompts, outputs, per rank the keys and values it was given to keep, whole rows [N, 2, Hkv, D])"""
    prompts = make_prompts(batch(ranks), ranks, torch.float32, heads=HEADS[ranks % 3])

    def attend(transport):
        kept = []
        out = gathered_attention(prompts, transport, keep=lambda heads, kv: kept.append(kv))
        return out, torch.cat(kept, dim=2)

    outputs, kept = zip(*run_ranks(attend, ranks))
    return prompts, outputs, kept


@pytest.mark.parametrize("ranks", RANKS)
def test_gather_equals_dense_in_fp32(ranks):
    prompts, outputs, _ = answers(ranks)
    assert_ring_equals_dense(prompts, outputs)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_row_of_every_rank_is_kept_once(ranks):
    prompts, _, kept = answers(ranks)
    for kv in kept:
        for side, whole in enumerate((prompts.k, prompts.v)):
            assert torch.equal(kv[:, side], torch.cat([prompts.shard(whole, rank) for rank in range(ranks)]))


@pytest.mark.parametrize("ranks, heads", list(zip([3, 5, 8], HEADS)))
def test_gather_equals_dense_and_ring_in_fp64_to_1e_12(ranks, heads):
    prompts = make_prompts(batch(ranks), ranks, torch.float64, heads=heads)
    outputs = run_ranks(lambda transport: gathered_attention(prompts, transport), ranks)
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12
    for gathered, ring in zip(outputs, run_ranks(lambda transport: ring_attention(prompts, transport), ranks)):
        torch.testing.assert_close(gathered, ring, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_every_backend_and_dtype(backend, dtype):
    """bf16 is rounded once, at the end."""
    prompts = make_prompts(batch(3), 3, dtype, heads=(6, 2, 17))
    assert_ring_equals_dense(prompts, run_ranks(lambda transport: gathered_attention(prompts, transport, backend), 3))


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_prompts_shorter_than_the_ranks(ranks):
    """Some ranks have no row at all; they keep the others' rows like everyone."""
    prompts = make_prompts([SHORT, ONE_CACHED], ranks, torch.float64)
    kept = []
    outputs = run_ranks(
        lambda transport: gathered_attention(prompts, transport, keep=lambda _, kv: kept.append(kv)), ranks
    )
    assert ranks == 2 or any(len(out) == 0 for out in outputs)
    assert_ring_equals_dense(prompts, outputs)
    assert sum(map(len, kept)) == ranks * 3


def test_many_heads_share_a_stage():
    assert [(stage.start, stage.stop) for stage in head_stages(4)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [(stage.start, stage.stop) for stage in head_stages(20)] == [(3 * i, min(3 * i + 3, 20)) for i in range(7)]
    prompts = make_prompts([mixed(2), CACHED], 2, torch.float64, heads=(20, 20, 8))
    outputs = run_ranks(lambda transport: gathered_attention(prompts, transport), 2)
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12


def test_tables_serve_all_layers_and_any_dealing_of_rows():
    """One table, two layers with values of their own, rows dealt at random."""
    draw = torch.Generator().manual_seed(1)
    owner = torch.randint(0, 3, (90,), generator=draw)
    layout = BatchLayout((Layout(5, 90, tuple((owner == rank).nonzero().flatten() + 5 for rank in range(3))),))
    tables = GatherTables(layout, "cpu")
    layers = [make_prompts([[Run(5, 90)]], 3, torch.float64, heads=(4, 2, 8), seed=seed) for seed in range(2)]
    for prompts in layers:
        prompts.layout = layout

        def attend(transport, prompts=prompts):
            q, k, v = (prompts.shard(tensors, transport.rank) for tensors in (prompts.q, prompts.k, prompts.v))
            return attend_gathered(q, k, v, tables, transport, scale=0.25, prefix=prompts.prefix)

        assert max(error for error, _ in ring_errors(prompts, run_ranks(attend, 3))) < 1e-12


def test_the_next_stage_travels_while_a_stage_is_computed(monkeypatch):
    """Posted before every kernel call: this stage and the next one, never more."""
    prompts = make_prompts([[Run(0, 40)]], 2, torch.float32, heads=(4, 4, 8))
    attend, events = pieces.causal_attention, {0: [], 1: []}

    def watch(transport):
        exchange, mine = transport.exchange, events[transport.rank]
        transport.exchange = lambda *message: mine.append("post") or exchange(*message)
        return gathered_attention(prompts, transport)

    def called(*args, **kwargs):
        events[int(threading.current_thread().name.split()[-1])].append("compute")
        return attend(*args, **kwargs)

    monkeypatch.setattr(pieces, "causal_attention", called)
    run_ranks(watch, 2)
    assert events[0] == events[1] == ["post", *["post", "compute"] * 3, "compute"]


def test_control_a_source_that_does_not_arrive_is_noticed():
    prompts = make_prompts([mixed(4)], 4, torch.float32)

    def attend(transport):
        post = transport.post

        def losing(send, receive, stage):
            settle = post(send, receive, stage)
            return lambda host: (settle(host), [lost.zero_() for lost in receive.get(1, [])])

        transport.post = losing
        return gathered_attention(prompts, transport)

    ((error, allowed),) = ring_errors(prompts, run_ranks(attend, 4))
    assert error > 10 * allowed


def test_control_keys_out_of_order_are_noticed(monkeypatch):
    """Keys in the order of the ranks instead of the positions."""
    prompts = make_prompts([mixed(4)], 4, torch.float32)

    class Unsorted(GatherTables):
        def __init__(self, *args):
            super().__init__(*args)
            self.order = [order.sort().values for order in self.order]

    monkeypatch.setattr("tests.parallel.prompts.GatherTables", Unsorted)
    errors = ring_errors(prompts, run_ranks(lambda transport: gathered_attention(prompts, transport), 4))
    assert errors[0][0] > 10 * errors[0][1]


def test_a_late_rank_breaks_the_gather_within_the_deadline():
    prompts, release = make_prompts([mixed(3)], 3, torch.float32), threading.Event()

    def hang(transport):
        if transport.rank == 1:
            release.wait(20)
        return gathered_attention(prompts, transport)

    began = time.monotonic()
    with pytest.raises(RingBroken) as caught:
        run_ranks(hang, 3, deadline_s=0.5)
    release.set()
    assert (caught.value.rank, caught.value.stage) == (1, "gather stage 1 of 1")
    assert caught.value.waited_s >= 0.5 and time.monotonic() - began < 0.5 + 1 + 0.5


def test_tensors_that_do_not_fit_the_layout_are_refused():
    layout = BatchLayout((make_layout([Run(4, 6)], 2),))
    tables, q, cached = GatherTables(layout, "cpu"), torch.zeros(3, 4, 8), (torch.zeros(4, 2, 8),) * 2

    def refused(match, q=q, k=q[:, :2], v=q[:, :2], ranks=2, prefix=cached):
        def attend(transport):
            attend_gathered(q, k, v, tables, transport, scale=1.0, prefix=lambda _: prefix)

        with pytest.raises(ConfigError, match=match):
            run_ranks(attend, ranks)

    refused("q with 2 rows", q=q[:2])
    refused("k with 2 rows", k=q[:2, :2])
    refused("v with 2 rows", v=q[:2, :2])
    refused(r"prefix of request 0 with 0 rows.*Allowed: 4", prefix=None)
    refused(r"prefix of request 0 with 3 rows.*Allowed: 4", prefix=(cached[0], cached[1][:3]))
    refused("Hq a multiple of Hkv", k=q[:, :3], v=q[:, :3])
    refused("k and v", v=q[:, :1])
    refused("a ring of 3 ranks", ranks=3)
