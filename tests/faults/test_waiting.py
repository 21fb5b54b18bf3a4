"""Waits as they are counted, what they cost, and the error that a wait ends in."""

import pickle
import threading
import time

import pytest

from sglang_mm.errors import RingBroken
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.waiting import EDGES_S, StageWaits, Waits, family_of, joined


@pytest.mark.parametrize(
    "stage, family",
    [
        ("ring hop 2 of 7", "ring hop"),
        ("ring hop 4 of 7, across nodes", "ring hop, across nodes"),
        ("gather stage 1 of 4", "gather stage"),
        ("pass_q results of hop 3", "pass_q results of hop"),
        ("check of prefill plan", "check of prefill plan"),
    ],
)
def test_numbers_are_left_out_of_a_stage(stage, family):
    assert family_of(stage) == family


def test_bins_hold_what_their_edges_say():
    waits = StageWaits()
    for seconds in [0.0, EDGES_S[0], 1.1 * EDGES_S[0], 0.02, EDGES_S[-1], 1e4]:
        waits.add(seconds)
    expected = [0] * (len(EDGES_S) + 1)
    expected[0], expected[1], expected[EDGES_S.index(0.03)], expected[-2], expected[-1] = 2, 1, 1, 1, 1
    assert waits.bins == expected and waits.count == 6 and waits.longest_s == 1e4
    assert waits.seconds == pytest.approx(sum([0.0001, 0.00011, 0.02, 300.0, 1e4]))
    assert sorted(EDGES_S) == list(EDGES_S) and len(set(EDGES_S)) == len(EDGES_S)


def test_taking_starts_anew_and_transports_are_joined():
    ring, replica = Waits(), Waits()
    for waits, stage in [
        (ring, "ring hop 1 of 2"),
        (ring, "ring hop 2 of 2"),
        (ring, "selection"),
        (replica, "selection"),
    ]:
        with waits.of([1], stage):
            pass
    with pytest.raises(RingBroken), ring.of([1], "selection"):
        raise RingBroken(1, "selection", 0.0)
    first, second = ring.take(), replica.take()
    assert {stage: waits.count for stage, waits in first.items()} == {"ring hop": 2, "selection": 2}
    assert ring.take() == {} and ring.now is None
    both = joined([first, second])
    assert both["selection"].count == sum(both["selection"].bins) == 3 and both["ring hop"].count == 2
    assert first["selection"].count == 2, "what was taken stays as it was"


def test_another_thread_sees_what_is_waited_for():
    transports, seen = {}, []
    all_there = threading.Barrier(3)

    def wait_for_rank_1(transport):
        transports[transport.rank] = transport
        all_there.wait(10)
        if transport.rank == 1:
            time.sleep(0.2)
            seen.extend(transports[rank].waits.now for rank in range(3))
        transport.check_equal(7, "something")
        return transport.waits.take()["check of something"]

    first, slow, last = run_ranks(wait_for_rank_1, 3)
    zero, one, two = seen
    assert one is None and zero.stage == two.stage == "check of something"
    assert zero.ranks == (1, 2) and two.ranks == (0, 1), "in the order in which they are waited for"
    assert 0.1 < time.monotonic() - zero.since < 10
    assert first.longest_s > 0.1 and last.longest_s > 0.1 and slow.longest_s < first.longest_s


def test_a_wait_costs_microseconds():
    """Below a hundredth of the least that a message over gloo takes: some 50 us would show, 1 us does not."""
    waits, peers, times = Waits(), (1, 2, 1, 2), []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(500):
            with waits.of(peers, "ring hop 1 of 2"):
                pass
        times.append((time.perf_counter() - began) / 500)
    assert min(times) < 10e-6, f"{min(times) * 1e6:.1f} us"


def test_the_error_says_who_where_and_what_and_can_be_pickled():
    plain = RingBroken(2, "ring hop 1 of 2", 1.54)
    assert str(plain) == "rank 2 did not answer during ring hop 1 of 2 after 1.5 s"
    assert (plain.layer, plain.cause, plain.silent) == (None, "", (2,))
    error = RingBroken(2, "gather stage 1 of 4", 3.0, "its process ended", layer=7, silent=(2, 3))
    assert str(error) == "rank 2, in layer 7, did not answer during gather stage 1 of 4 after 3.0 s: its process ended"
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) and vars(back) == vars(error)
