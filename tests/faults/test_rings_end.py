"""Rings that break outside of prefill, ranks that never come, and what is left of a ring that has ended."""

import pytest

from sglang_mm.events.hub import EventHub
from tests.faults import rings
from tests.faults.pool import Pool
from tests.faults.ranks import prepare

RANKS = 4
DEADLINE_S = 0.8
PARENT_S = 40.0
MORE_S = 1.0


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """run(job, *arguments) -> what it returned, by rank; each time in a new ring of the same processes."""
    folder, number = tmp_path_factory.mktemp("rings"), iter(range(100))
    with EventHub() as hub, Pool(RANKS, folder) as pool:
        pool.run(prepare, [(rank, RANKS, hub.environment) for rank in range(RANKS)], PARENT_S)

        def run(job, *arguments):
            hub.forget()
            rendezvous = str(folder / f"ring{next(number)}")
            answers = pool.run(job, [(rank, RANKS, rendezvous, *arguments) for rank in range(RANKS)], PARENT_S)
            for rank, answer in answers.items():
                assert not answer.failure, f"rank {rank}: {answer.failure}"
            return [answers[rank].result for rank in range(RANKS)]

        yield run


def test_a_decode_step_ends_at_the_deadline_and_names_the_rank_that_hangs(ring):
    told = ring(rings.decode, 1, DEADLINE_S)
    for rank in (0, 2, 3):
        assert told[rank]["steps"] == rings.HANGS_AT and told[rank]["stage"] == "partial results"
        assert told[rank]["own"] == told[rank]["rank"] == 1, "each waits for it directly"
        assert told[rank]["elapsed_s"] < DEADLINE_S + MORE_S
    assert told[1]["steps"] == rings.HANGS_AT, "a rank that comes back finds the ring broken, and does not go on alone"


@pytest.mark.slow
@pytest.mark.parametrize("absent", [(3,), (0, 2)])
def test_those_that_did_not_come_are_named_and_no_others(ring, absent):
    told = ring(rings.some_do_not_come, absent, DEADLINE_S)
    for rank in set(range(RANKS)) - set(absent):
        assert told[rank]["silent"] == absent and told[rank]["rank"] == absent[0]
        assert DEADLINE_S - 0.1 < told[rank]["elapsed_s"] < DEADLINE_S + MORE_S
        now = told[rank]["now"]
        assert now["ranks"][0] == absent[0] and set(absent) <= set(now["ranks"]) and rank not in now["ranks"]
        assert now["stage"] == "check of something" and 0 <= now["since_s"] < DEADLINE_S / 2
        assert told[rank]["then"] is None


@pytest.mark.slow
def test_all_messages_of_an_exchange_share_one_deadline(ring):
    told = ring(rings.some_do_not_come, (3,), DEADLINE_S, 1)
    for rank in (0, 2):
        assert told[rank]["silent"] == (3,), "not the one that was waited for first, and came late"
        assert told[rank]["elapsed_s"] < 1.5 * DEADLINE_S, "one after the other it would be 1.7"


@pytest.mark.slow
def test_hanging_up_is_noticed_at_once_though_messages_are_under_way(ring):
    """gloo keeps connections open as long as any message is held; rank 3 hears of it from rank 2 alone."""
    told = ring(rings.hangs_up, 1, 3.0)
    for rank in (0, 2, 3):
        assert told[rank]["elapsed_s"] < 2.5 and told[rank]["stage"].startswith("hop"), told[rank]
    assert told[2]["rank"] == 1 and told[3]["rank"] == 2, "each saw its neighbour go; the hub would tell them the cause"


def test_a_broken_ring_says_so_again_and_holds_nothing(ring):
    told = ring(rings.after_the_end, 2, DEADLINE_S)
    for rank in (0, 1, 3):
        assert told[rank]["let go"] == [True] * 4
        assert told[rank]["again"]["rank"] in range(RANKS) and told[rank]["again"] == told[rank]["once more"]
        assert told[rank]["elapsed_s"] < 1.2 and told[rank]["close_s"] < 4


def test_a_closed_ring_refuses_and_its_waits_were_counted(ring):
    for told in ring(rings.closed):
        assert "closed ring" in told["text"] and not told["is_initialized"]
        assert list(told["waits"]) == ["check of something"]
        waits = told["waits"]["check of something"]
        assert waits["count"] == sum(waits["bins"]) == 1 and waits["seconds"] == waits["longest_s"] > 0


@pytest.mark.slow
def test_a_rank_that_never_joins_holds_nobody(ring):
    """The last one here: torch counts worlds, and these ranks no longer agree on the count."""
    seconds = ring(rings.never_joins, 2, DEADLINE_S)
    assert all(DEADLINE_S - 0.1 < seconds[rank] < DEADLINE_S + 2 * MORE_S for rank in (0, 1, 3))
