"""The cost model: counts against brute force, seconds by hand, what must grow with what, who wins where."""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.parallel.calibration import calibrate
from sglang_mm.parallel.cost import Constants, Link, ModelShape, choose, pairs_between, predict
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.types import BatchLayout, Layout, Run
from tests.parallel.prompts import batch

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
LAYER = ModelShape(layers=1, q_heads=2, kv_heads=1, head_dim=4, dtype=torch.float32)  # 32 operations a pair
QWEN = ModelShape(layers=28, q_heads=28, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
FREE = Constants(math.inf, math.inf, 0.0, math.inf)
H100 = Constants(600e12, 360e9, 10e-6, 3.35e12, 70e-6)  # arithmetic, not measured


def prompt(tokens: int, ranks: int, start: int = 0) -> BatchLayout:
    return BatchLayout((make_layout([Run(start, tokens)], ranks),))


def dealt(owner: torch.Tensor, ranks: int) -> Layout:
    return Layout(0, len(owner), tuple((owner == rank).nonzero().flatten() for rank in range(ranks)))


def brute_force(layout: Layout) -> torch.Tensor:
    rows = layout.rows
    return torch.tensor([[int((mine[:, None] >= theirs[None, :]).sum()) for theirs in rows] for mine in rows])


@pytest.mark.parametrize("ranks", range(1, 9))
def test_pairs_are_those_of_the_rows(ranks):
    random = torch.randint(0, ranks, (40,), generator=torch.Generator().manual_seed(ranks))
    for layout in [make_layout(runs, ranks) for runs in batch(ranks)] + [dealt(random, ranks)]:
        pairs = pairs_between(layout)
        assert torch.equal(pairs, brute_force(layout))
        cached = [layout.start * len(rows) for rows in layout.rows]
        assert (pairs.sum(1) + torch.tensor(cached)).tolist() == layout.attended_pairs()


def test_one_rank_by_hand():
    """10 rows after 6 cached ones: 60 + 55 pairs of 32 operations. The ring merges the prefix and the own piece."""
    compute = replace(FREE, attention_flops_per_s=8.0)
    assert predict(prompt(10, 1, 6), LAYER, compute) == {"ring": 115 * 4, "gather": 115 * 4}
    calls = replace(FREE, call_s=1.0)
    assert predict(prompt(10, 1, 6), LAYER, calls) == {"ring": 2, "gather": 1}
    assert predict(prompt(10, 1), replace(LAYER, layers=3, kv_heads=2), calls) == {"ring": 3, "gather": 6}
    copies = replace(FREE, memory_bytes_per_s=1.0)
    merged, ordered = 2 * 3 * 10 * 2 * 4 * 4, 2 * 16 * 2 * 4 * 4
    assert predict(prompt(10, 1, 6), LAYER, copies) == {"ring": merged, "gather": ordered}


def test_two_ranks_by_hand():
    """Rows 0 and 3 on rank 0, 1 and 2 on rank 1: 3 pairs inside a rank, 2 with the other one."""
    layout = prompt(4, 2)
    assert [rows.tolist() for rows in layout.requests[0].rows] == [[0, 3], [1, 2]]
    compute_s, send_s = [3 * 32, 2 * 32], 5.0 + 2 * 2 * 4 * 4 / 0.5
    constants = replace(FREE, attention_flops_per_s=1.0, latency_s=5.0, bytes_per_s=0.5)
    assert send_s > compute_s[0]
    expected = {"ring": send_s + compute_s[1], "gather": send_s + sum(compute_s)}
    assert predict(layout, LAYER, constants) == expected
    fast = replace(constants, bytes_per_s=math.inf)
    assert predict(layout, LAYER, fast) == {"ring": sum(compute_s), "gather": 5.0 + sum(compute_s)}


def test_a_rank_with_few_rows_receives_more_than_it_sends():
    """Rank 0 has rows 0 to 4, 15 pairs; rank 1 has 5 to 7, 21 pairs. 5 rows go one way while 3 go the other."""
    layout = BatchLayout((dealt(torch.tensor([0] * 5 + [1] * 3), 2),))
    constants = replace(FREE, attention_flops_per_s=32.0, bytes_per_s=1.0)
    send_s = 5 * 2 * 4 * 4
    assert predict(layout, LAYER, constants) == {"ring": send_s + 15, "gather": send_s + 21}


def test_the_ring_waits_for_the_slowest_rank_of_each_hop_and_the_gather_for_the_slowest_rank():
    """Each rank has the most pairs in another hop."""
    layout = dealt(torch.tensor([0, 0, 0, 1, 1, 1, 2, 0, 2, 2]), 3)
    pairs = pairs_between(layout)
    hops = [max(int(pairs[rank, (rank - hop) % 3]) for rank in range(3)) for hop in range(3)]
    slowest = int(pairs.sum(1).max())
    assert sum(hops) > slowest
    seconds = predict(BatchLayout((layout,)), LAYER, replace(FREE, attention_flops_per_s=32.0))
    assert seconds == {"ring": sum(hops), "gather": slowest}


def test_a_round_inside_the_nodes_hides_what_crosses_meanwhile():
    """4 ranks on 2 nodes, by hand: hops 0 and 1 meet the own node's pieces, 2 and 3 the other's."""
    layout = dealt(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]), 4)
    pairs, send = pairs_between(layout), 3 * 2 * 4 * 4
    sources = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    hops = [max(int(pairs[rank, source]) for rank, source in enumerate(each)) for each in sources]

    def ring_s(inside_s: float, across_s: float) -> float:
        constants = Constants(32.0, send / inside_s, 0.0, math.inf, across=Link(send / across_s, 0.0))
        return predict(BatchLayout((layout,)), LAYER, constants, nodes=2)["ring"]

    assert ring_s(0.5, 0.5) == sum(hops)
    assert ring_s(0.5, hops[0] + hops[1]) == sum(hops)
    assert ring_s(0.5, 100) == 100 + hops[2] + hops[3]
    assert ring_s(64, 8) == 64 + hops[1] + 64 + hops[3], "a link inside is used once a round"


def test_a_gathered_stage_crosses_before_it_is_passed_on():
    """4 ranks of 3 rows on 2 nodes, 4 stages: 1 share crosses, 2 come from the neighbour, 24 pairs a stage and more."""
    layout = dealt(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]), 4)
    shape, share = replace(LAYER, q_heads=4, kv_heads=4), 3 * 2 * 4 * 4
    slowest = int(pairs_between(layout).sum(1).max())

    def gather_s(inside_s: float, across_s: float, latency_s: float = 0.0) -> float:
        constants = replace(FREE, attention_flops_per_s=16.0, bytes_per_s=2 * share / inside_s, latency_s=latency_s)
        constants = replace(constants, across=Link(share / across_s, 0.0))
        return predict(BatchLayout((layout,)), shape, constants, nodes=2)["gather"]

    assert gather_s(1, 2) == 2 + max(1, 2) + 4 * slowest
    assert gather_s(3, 2) == 2 + max(3, 2) + 4 * slowest
    assert gather_s(3, 1000) == 4 * 1000 + 2 * slowest, "the last two stages have nothing left to hide"
    assert gather_s(1000, 2) == 2 + 4 * 1000 + slowest
    assert gather_s(3, 2, latency_s=5) == gather_s(3, 2) + 2 * 5, "two messages, the own share and a passed-on one"


def test_links_of_nodes_with_one_rank_and_of_one_node():
    fast, slow = replace(H100, across=None), replace(H100, bytes_per_s=5e9, latency_s=1e-5)
    apart = replace(fast, across=slow.inside)
    layout = prompt(20_000, 4)
    assert predict(layout, QWEN, apart, nodes=4) == predict(layout, QWEN, slow), "one rank on each: all is across"
    assert predict(layout, QWEN, apart) == predict(layout, QWEN, fast), "one node: nothing is"
    between = predict(layout, QWEN, apart, nodes=2)
    for schedule, seconds in predict(layout, QWEN, slow).items():
        assert predict(layout, QWEN, fast)[schedule] <= between[schedule] < seconds
    with pytest.raises(ConfigError, match="constants of one node for 2"):
        predict(layout, QWEN, H100, nodes=2)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_attention_grows_with_the_square_of_the_length_and_shrinks_with_the_ranks(schedule):
    constants = replace(FREE, attention_flops_per_s=1e12)
    one, double = (predict(prompt(tokens, 1), QWEN, constants)[schedule] for tokens in (1 << 17, 1 << 18))
    assert double == pytest.approx(4 * one, rel=1e-4)
    for ranks in range(2, 9):
        assert predict(prompt(1 << 17, ranks), QWEN, constants)[schedule] == pytest.approx(one / ranks, rel=0.05)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_more_work_or_a_slower_machine_never_costs_less(schedule):
    def seconds(tokens=20_000, start=0, constants=H100, shape=QWEN):
        return predict(prompt(tokens, 4, start), shape, constants)[schedule]

    lengths = [seconds(tokens) for tokens in (600, 3000, 20_000, 100_000)]
    assert lengths == sorted(lengths) and lengths[0] > 0
    assert seconds(start=5000) > seconds()
    assert seconds(shape=replace(QWEN, q_heads=56)) > seconds()
    for name in ("attention_flops_per_s", "memory_bytes_per_s"):
        assert seconds(constants=replace(H100, **{name: getattr(H100, name) / 3})) > seconds()
    assert seconds(constants=replace(H100, call_s=1e-3)) > seconds()
    assert seconds(constants=replace(H100, latency_s=0.1)) > seconds() + 28 * 3 * 0.1 / 2
    assert seconds(constants=replace(H100, bytes_per_s=1e8)) > seconds()


@pytest.mark.parametrize("tokens, ranks, schedule", [(4096, 2, "ring"), (32_768, 2, "gather"), (1 << 20, 8, "gather")])
def test_few_rows_pay_for_kernel_calls_and_many_for_merges(tokens, ranks, schedule):
    """4 stages call the kernel 4 times, C hops C times; C passes over a state of 14 KiB a row grow with the rows."""
    assert choose(predict(prompt(tokens, ranks), QWEN, H100)) == schedule


def test_a_million_tokens_on_eight_ranks():
    """Attention takes 46 s under either; eight merges of the state are not quite made up by copies and first stages."""
    seconds, tokens = predict(prompt(1 << 20, 8), QWEN, H100), 1 << 20
    merges_s = 28 * 8 * 3 * (tokens / 8) * 28 * 128 * 4 / H100.memory_bytes_per_s
    assert 0.5 * merges_s < seconds["ring"] - seconds["gather"] < merges_s
    assert seconds["gather"] == pytest.approx(28 * 4 * 28 * 128 * tokens**2 / 2 / 8 / 600e12, rel=0.01)


def test_the_ring_wins_where_messages_are_slow_to_start_or_one_stage_hides_nothing():
    assert choose(predict(prompt(2000, 8), QWEN, replace(H100, latency_s=1e-3))) == "ring"
    lone_head, slow_link = replace(QWEN, q_heads=7, kv_heads=1), replace(H100, bytes_per_s=5e9)
    assert choose(predict(prompt(1 << 17, 8), lone_head, slow_link)) == "ring"
    assert choose(predict(prompt(1 << 17, 8), lone_head, replace(slow_link, memory_bytes_per_s=1e11))) == "gather"


def test_ties_go_to_the_ring():
    assert choose({"gather": 1.0, "ring": 1.0}) == "ring"
    assert choose({"ring": 1.0, "gather": 0.9}) == "gather"
    assert choose(predict(prompt(100, 3), QWEN, FREE)) == "ring"


def test_calibration_agrees_on_one_set_of_constants_within_a_second():
    began = time.monotonic()
    found = run_ranks(lambda transport: calibrate(transport, replace(QWEN, dtype=torch.float32)), 2)
    assert time.monotonic() - began < 10, "far beyond a second even on a busy machine"
    assert found[0] == found[1]
    assert found[0].across is None
    assert all(0 < value < math.inf for name, value in vars(found[0]).items() if name != "across")
    assert predict(prompt(4000, 2), QWEN, found[0])["ring"] > 0


def test_calibration_of_one_rank_finds_no_link():
    (found,) = run_ranks(lambda transport: calibrate(transport, LAYER), 1)
    assert (found.bytes_per_s, found.latency_s) == (math.inf, 0.0) and found.attention_flops_per_s > 0


def test_calibration_measures_the_links_between_nodes_apart():
    def slow_across(transport):
        post = transport.post

        def delayed(send, receive, stage):
            settle, crosses = post(send, receive, stage), any(abs(transport.rank - peer) > 1 for peer in send)
            return lambda host: (time.sleep(0.05 if crosses and len(send) == 1 else 0), settle(host))

        transport.post = delayed
        return calibrate(transport, LAYER)

    found = run_ranks(slow_across, 4, nodes=2)
    assert all(constants == found[0] for constants in found)
    assert found[0].across.latency_s > 0.05 > found[0].latency_s
    assert predict(prompt(4000, 4), LAYER, found[0], nodes=2)["gather"] > 0
    (apart, _) = run_ranks(lambda transport: calibrate(transport, LAYER), 2, nodes=2)
    assert (apart.bytes_per_s, apart.latency_s) == (math.inf, 0.0) and 0 < apart.across.bytes_per_s < math.inf


def test_calibration_does_not_wait_longer_than_the_deadline():
    release = threading.Event()

    def missing(transport):
        return release.wait(20) if transport.rank == 1 else calibrate(transport, LAYER)

    with pytest.raises(RingBroken, match="rank 1 did not answer during calibration"):
        run_ranks(missing, 2, deadline_s=0.5)
    release.set()
