"""Rings over several nodes: who sends what to whom, and the same answers as on one."""

from collections import Counter
from itertools import product

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.distributed import DistributedTransport
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.nodes import Nodes, Send, pieces_at_once, ring_hops
from sglang_mm.parallel.ring import ring_pieces
from sglang_mm.types import Run
from tests.memory import PeakMeter
from tests.parallel.prompts import SCHEDULES, SHORT, make_prompts, ring_errors

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
SHAPES = list(product((1, 2, 3), (1, 2, 3)))
MANY = [*product(range(1, 6), range(1, 6))]
UNEVEN = [[Run(0, 7), Run(7, 4 * 37, 4, "video"), Run(155, 10)], SHORT, [Run(30, 5), Run(35, 41)]]


def prompts_of(ranks: int, requests=UNEVEN):
    return make_prompts(requests, ranks, torch.float64, heads=(6, 3, 8))


def hops_of(nodes: Nodes) -> list[list]:
    return [ring_hops(rank, nodes) for rank in range(nodes.ranks)]


@pytest.mark.parametrize("count, each", MANY)
def test_every_rank_meets_every_piece_once_and_own_first(count, each):
    for rank, hops in enumerate(hops_of(Nodes(count * each, count))):
        assert hops[0].source == rank
        assert sorted(hop.source for hop in hops) == list(range(count * each))


@pytest.mark.parametrize("count, each", MANY)
def test_every_send_has_its_receive_and_brings_what_is_met(count, each):
    """In the same hop, between the same two ranks, and it is the piece that the sender meets there."""
    all_hops = hops_of(Nodes(count * each, count))
    for rank, hops in enumerate(all_hops):
        awaited = [send.due for hop in hops for send in hop.sends]
        assert sorted(awaited) == list(range(1, count * each))
        for number, hop in enumerate(hops):
            for send in hop.sends:
                (theirs,) = [other for other in all_hops[send.by][number].sends if other.across == send.across]
                assert theirs.to == rank and theirs.due == send.due > number
                assert all_hops[send.by][number].source == hops[send.due].source


@pytest.mark.parametrize("count, each", MANY)
def test_one_piece_a_round_crosses_from_each_rank_and_has_a_round_to_do_so(count, each):
    nodes = Nodes(count * each, count)
    for rank, hops in enumerate(hops_of(nodes)):
        crossing = [(number, send) for number, hop in enumerate(hops) for send in hop.sends if send.across]
        assert [number for number, _ in crossing] == [each * round_ for round_ in range(count - 1)]
        assert all(send.due == number + each and hops[number].sends[0] is send for number, send in crossing)
        for hop in hops:
            assert all(nodes.are_apart(rank, send.to) == send.across for send in hop.sends)
            assert all(nodes.are_apart(rank, send.by) == send.across for send in hop.sends)


@pytest.mark.parametrize("count, each", MANY)
def test_pieces_held_are_what_is_met_what_comes_and_what_still_goes(count, each):
    nodes = Nodes(count * each, count)
    for rank, hops in enumerate(hops_of(nodes)):
        most, under_way = 0, {}
        for number, hop in enumerate(hops):
            under_way.pop(number, None)
            under_way |= {send.due: {hop.source, hops[send.due].source} for send in hop.sends}
            most = max(most, len({hop.source}.union(*under_way.values())))
        assert most == pieces_at_once(nodes), rank


@pytest.mark.parametrize("ranks", range(1, 7))
def test_one_node_and_one_rank_on_each_are_the_flat_ring(ranks):
    for rank in range(ranks):
        flat = [(rank - hop) % ranks for hop in range(ranks)]
        following, before = (rank + 1) % ranks, (rank - 1) % ranks
        for count in (1, ranks):
            hops = ring_hops(rank, Nodes(ranks, count))
            sends = [(Send(following, before, hop + 1, count > 1),) for hop in range(ranks - 1)]
            assert [hop.source for hop in hops] == flat and [hop.sends for hop in hops] == [*sends, ()]


def test_neighbours_and_counterparts():
    nodes = Nodes(6, 2)
    assert (nodes.each, nodes.two_links) == (3, True)
    assert (nodes.neighbours(4), nodes.counterparts(4)) == ([3, 5], [1])
    assert not Nodes(6, 6).two_links and not Nodes(6).two_links
    assert Nodes(6).neighbours(0) == Nodes(6, 6).counterparts(0) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [0, 4])
def test_nodes_that_do_not_divide_the_ring_are_refused(count):
    match = f"a ring of 6 ranks on {count} nodes.*equally many.*--cp"
    with pytest.raises(ConfigError, match=match):
        run_ranks(lambda transport: None, 6, nodes=count)
    with pytest.raises(ConfigError, match="a ring of 1 ranks on 2 nodes"):
        DistributedTransport(None, [0], "cpu", deadline_s=1, nodes=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("requests", [UNEVEN, [SHORT]], ids=["uneven", "ranks without a row"])
@pytest.mark.parametrize("count, each", SHAPES)
def test_equals_dense_and_one_node(schedule, requests, count, each):
    prompts = prompts_of(count * each, requests)
    outputs, flat = (
        run_ranks(lambda transport: SCHEDULES[schedule](prompts, transport), count * each, nodes=nodes)
        for nodes in (count, 1)
    )
    assert max(error for error, _ in ring_errors(prompts, outputs)) < 1e-12
    for mine, theirs in zip(outputs, flat):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count, each", [(2, 2), (3, 2), (2, 3)])
def test_each_byte_crosses_once_between_two_nodes(schedule, count, each):
    """A rank's own rows to each other node with `gather`, as many pieces with `ring`; without it G times as many."""
    prompts = prompts_of(count * each)
    rows, row_bytes = [prompts.layout.rows(rank) for rank in range(count * each)], 2 * 3 * 8 * 8

    def sent(nodes: int):
        def attend(transport):
            SCHEDULES[schedule](prompts, transport)
            return transport.meter.take()["kv"]

        return run_ranks(attend, count * each, nodes=nodes)

    for rank, (traffic, flat) in enumerate(zip(sent(count), sent(1))):
        crossing = [Nodes(count * each, count).next_across(rank, -round_) for round_ in range(count - 1)]
        owned = {"ring": sum(rows[source] for source in crossing), "gather": rows[rank] * (count - 1)}[schedule]
        assert traffic.bytes_across == owned * row_bytes
        assert flat.bytes_across == 0 and flat.bytes_sent > traffic.bytes_across
    total = sum(traffic.bytes_sent for traffic in sent(count))
    assert total == sum(rows) * (count * each - 1) * row_bytes, "each rank has had all pieces, no one twice"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_links_across_carry_a_message_at_a_time(schedule):
    """The next one is posted when the one before has come; what goes inside the node is posted meanwhile."""
    prompts = prompts_of(6)

    def attend(transport):
        exchange, events, under_way = transport.exchange, [], Counter()

        def watched(send, receive, stage, kind):
            link = "across" if stage.endswith("across nodes") else "inside"
            assert all((link == "across") == (abs(transport.rank - peer) >= 2) for peer in (*send, *receive))
            settle = exchange(send, receive, stage, kind)
            under_way[link] += 1
            events.append((link, under_way["across"], under_way["inside"]))

            def settled(host):
                settle(host)
                under_way[link] -= 1

            return settled

        transport.exchange = watched
        SCHEDULES[schedule](prompts, transport)
        assert not +under_way
        return events

    for events in run_ranks(attend, 6, nodes=3):
        assert max(across for link, across, _ in events if link == "across") == 1
        assert any(across and inside for _, across, inside in events), "both links carry something at once"


def test_a_piece_crosses_while_others_are_computed():
    """Nobody has asked for the second node's pieces, and they can come."""

    def watch(transport):
        post, arrived = transport.post, []

        def early(send, receive, stage):
            settle = post(send, receive, stage)
            if "across" in stage:
                arrived.append(stage)
                settle(True)
                return lambda host: None
            return settle

        transport.post = early
        pieces = ring_pieces(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), [2] * 4, transport)
        return [(piece.source, len(arrived)) for piece in pieces]

    assert run_ranks(watch, 4, nodes=2)[1] == [(1, 1), (0, 1), (3, 1), (2, 1)]


@pytest.mark.parametrize("count, each", [(1, 4), (2, 2), (2, 3), (3, 3)])
def test_the_ring_holds_no_more_pieces_than_it_says(count, each):
    """Sent ones are kept alive until they are settled, as processes do."""
    size, ranks = 64, count * each

    def most(transport) -> int:
        post, alive = transport.post, Counter()

        def holding(send, receive, stage):
            settle = post(send, receive, stage)
            held = [t for tensors in (*send.values(), *receive.values()) for t in tensors]
            alive.update(t.data_ptr() for t in held)

            def settled(host):
                settle(host)
                alive.subtract(t.data_ptr() for t in held)

            return settled

        transport.post = holding
        held = 0
        for piece in ring_pieces(torch.zeros(size, 1, 4), torch.zeros(size, 1, 4), [size] * ranks, transport):
            held = max(held, len({piece.k.data_ptr(), *(+alive)}))
        return held

    assert run_ranks(most, ranks, nodes=count) == [pieces_at_once(Nodes(ranks, count))] * ranks


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_control_keys_lost_between_nodes_are_noticed(schedule):
    """On one of four ranks; with `gather` its neighbour gets them from it."""
    prompts, wrong = prompts_of(4), []

    def attend(transport):
        post = transport.post

        def losing(send, receive, stage):
            settle = post(send, receive, stage)
            lost = [tensor for tensors in receive.values() for tensor in tensors if stage.endswith("across nodes")]
            return lambda host: (settle(host), [tensor.zero_() for tensor in lost])

        if transport.rank == 1:
            transport.post = losing
        return SCHEDULES[schedule](prompts, transport)

    whole = run_ranks(lambda transport: SCHEDULES[schedule](prompts, transport), 4, nodes=2)
    for rank, out in enumerate(run_ranks(attend, 4, nodes=2)):
        if (out - whole[rank]).abs().max() > 1e-3:
            wrong.append(rank)
    assert wrong == [0, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count, each", [(2, 2), (2, 3)])
def test_memory_beyond_that_on_one_node(schedule, count, each):
    """The pieces that pieces_at_once() adds; of a stage, the own share and those of the counterparts."""
    tokens, ranks = 3072, count * each
    prompts = make_prompts([[Run(0, tokens)]], ranks, torch.float32, heads=(4, 4, 8))

    def peak(nodes: int) -> list[int]:
        def run(transport) -> int:
            with PeakMeter(without=("parallel/local.py",)) as meter:
                SCHEDULES[schedule](prompts, transport)
            return meter.peak.bytes

        return run_ranks(run, ranks, nodes=nodes)

    row, nodes = 2 * 4 * 8 * 4, Nodes(ranks, count)
    piece, stage = tokens // ranks * row, tokens * row // 4
    allowed = {"ring": (pieces_at_once(nodes) - 2) * piece, "gather": stage // each}[schedule]
    for more, flat in zip(peak(count), peak(1)):
        assert more - flat <= 1.05 * allowed
