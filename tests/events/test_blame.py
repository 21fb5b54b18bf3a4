"""Verdicts as a table: what is known of the ranks, and who is the cause. Whoever asks first, the answer is the same."""

import itertools

import pytest
from msgspec.structs import replace

from sglang_mm.events.blame import Known, culprit
from sglang_mm.events.messages import Fault, Heartbeat
from sglang_mm.events.wire import SILENT_AFTER_S

FRESH, OLD = 0.1, SILENT_AFTER_S + 0.3


def beat(rank: int, waits_for: tuple[int, ...] = (), layer: int = 3, age: float = FRESH, stage: str = "layers"):
    told = Heartbeat(rank=rank, node=f"n{rank}", layer=layer, stage=stage, waits_for=list(waits_for))
    return rank, (told, age)


def waited(rank: int, blames: int, *silent: int) -> Fault:
    return Fault(rank=rank, what="waited", reason="RingBroken", blames=blames, silent=[blames, *silent], waited_s=2.0)


def own(rank: int, reason: str = "OutOfMemoryError: no room") -> Fault:
    return Fault(rank=rank, what="own", reason=reason, node="n9", layer=7, stage="vision")


def differ(rank: int, odd: int | None) -> Fault:
    return Fault(rank=rank, what="differ", reason="RankMismatch: ranks differ", blames=odd)


def cut(rank: int) -> Fault:
    return Fault(rank=rank, what="cut", reason="RuntimeError: Connection closed by peer")


ALIVE = [beat(0, (1,)), beat(1, (2,)), beat(2)]
SCENARIOS = {
    "killed": (ALIVE, [waited(1, 2)], {2: "its process ended"}, (2, "gone")),
    "killed while it waited": (
        [beat(0), beat(1, (2,)), beat(2)],
        [waited(0, 1)],
        {1: "its process ended"},
        (1, "gone"),
    ),
    "killed, seen by its owner alone": (ALIVE, [], {2: "exit code -9"}, (2, "gone")),
    "stopped": ([beat(0), beat(1, (2,)), beat(2, age=OLD)], [waited(0, 1)], {}, (2, "silent")),
    "stopped while it waited": ([beat(0), beat(1, (0,), age=OLD)], [waited(0, 1)], {}, (1, "silent")),
    "two are stopped": (
        [beat(0), beat(1, age=OLD), beat(2, age=OLD + 1)],
        [waited(0, 1)],
        {},
        (1, "silent"),
    ),
    "raised": (ALIVE, [waited(1, 2), own(2)], {}, (2, "failed")),
    "raised, then ended": (ALIVE, [own(2), waited(1, 2)], {2: "its process ended"}, (2, "failed")),
    "slow": (ALIVE, [waited(0, 1)], {}, (2, "slow")),
    "cascade of the told": (ALIVE, [waited(0, 1), waited(1, 2), own(2)], {}, (2, "failed")),
    "cascade of the ended": (ALIVE, [waited(0, 1)], {1: "its process ended", 2: "its process ended"}, (2, "gone")),
    "a survivor that has ended": (ALIVE, [waited(1, 2), waited(0, 1)], {1: "exit", 2: "killed"}, (2, "gone")),
    "mismatch": (ALIVE, [differ(0, 1), differ(1, 1), differ(2, 1)], {}, (1, "differ")),
    "mismatch without majority": (ALIVE, [differ(0, None), differ(1, None)], {}, (None, "differ")),
    "circle": ([beat(0, (1,)), beat(1, (2,)), beat(2, (0,), layer=2)], [waited(0, 1)], {}, (2, "circle")),
    "a circle beside the slow one": ([beat(0, (1, 2)), beat(1), beat(2, (0,))], [waited(0, 1, 2)], {}, (1, "slow")),
    "circle of the told": (ALIVE, [waited(0, 1), waited(1, 2), waited(2, 0)], {}, (0, "circle")),
    "never heard of": ([], [waited(0, 1)], {}, (1, "unknown")),
    "cut off, one ended": (ALIVE, [cut(0)], {2: "its process ended"}, (2, "gone")),
    "cut off, one slow": (ALIVE, [cut(0)], {}, (2, "slow")),
    "cut off, nothing known": ([], [cut(0)], {}, (None, "unknown")),
    "the trail ends, another rank explains it": ([*ALIVE, beat(3)], [waited(0, 1), own(3)], {}, (3, "failed")),
    "hosts do not wait, one is behind": (
        [beat(0, layer=5), beat(1, layer=5), beat(2)],
        [waited(0, 1)],
        {},
        (2, "slow"),
    ),
    "several did not come": ([beat(0), beat(1, (0,)), beat(2, age=OLD)], [waited(0, 1, 2)], {}, (2, "silent")),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_verdicts(name):
    beats, faults, losses, expected = SCENARIOS[name]
    found = culprit(Known(dict(beats), {fault.rank: fault for fault in faults}, losses))
    assert (found.rank, found.what) == expected


@pytest.mark.parametrize("name", [name for name in SCENARIOS if len(SCENARIOS[name][1]) > 1])
def test_the_order_in_which_faults_are_told_does_not_matter(name):
    beats, faults, losses, (rank, what) = SCENARIOS[name]
    for order in itertools.permutations(faults):
        found = culprit(Known(dict(beats), {fault.rank: fault for fault in order}, losses))
        assert (found.rank, found.what) == (rank, what)


def test_the_first_of_two_failures_is_the_cause():
    later = own(0, "OSError: later")
    found = culprit(Known(dict(ALIVE), {2: own(2), 0: later}, {}))
    assert (found.rank, found.reason, found.layer, found.stage) == (2, "OutOfMemoryError: no room", 7, "vision")
    assert str(found) == "rank 2 (layer 7, stage vision, node n9): OutOfMemoryError: no room"


def test_a_verdict_says_where_the_rank_was_last():
    found = culprit(Known(dict(ALIVE), {0: waited(0, 1)}, {2: "exit code -9"}))
    assert str(found) == "rank 2 (layer 3, stage layers, node n2): exit code -9"


@pytest.mark.parametrize(
    ("heard", "waiter", "expected"),
    [
        (beat(1, layer=0), replace(waited(0, 1), layer=3, stage="layers"), (3, "layers")),
        (beat(1, layer=-1, stage=""), replace(waited(0, 1), layer=3, stage="layers"), (3, "layers")),
        (beat(1, layer=4), replace(waited(0, 1), layer=3, stage="layers"), (4, "layers")),
        (beat(1, layer=2), waited(0, 1), (2, "layers")),
    ],
)
def test_who_waits_for_it_knows_how_far_a_rank_came(heard, waiter, expected):
    found = culprit(Known(dict([heard]), {0: waiter}, {1: "its process ended"}))
    assert (found.layer, found.stage) == expected


def test_nothing_told_is_no_fault():
    assert culprit(Known(dict([beat(0, (1,)), beat(1, age=OLD)]), {}, {})) is None


def test_many_ranks_that_wait_for_all_others_are_judged_at_once():
    ranks = range(300)
    beats = dict(beat(rank, tuple(other for other in ranks if other != rank)) for rank in ranks)
    assert culprit(Known(beats, {0: waited(0, 1)}, {})).what == "circle"
    chain = dict(beat(rank, (rank + 1,)) for rank in ranks)
    assert culprit(Known(chain, {0: waited(0, 1)}, {})) is not None
