"""Who is slow: the one that waits least, where the others wait long enough to be believed."""

import pytest

from sglang_mm.events import EventHub, Publisher, Subscriber
from sglang_mm.events.messages import PrefillEnded, Straggler
from sglang_mm.events.stragglers import IN_A_ROW, Slow, Stragglers, slow_rank, tells
from tests.events.telling import hear

TEN = [10.0, 10.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("waited", "total", "expected"),
    [
        ([4.0, 0.2, 4.0, 4.2], TEN, Slow(1, 0.02, 0.4)),
        ([4.0, 1.3, 4.0, 4.2], TEN, Slow(1, 0.13, 0.4)),  # just below a third of 0.4
        ([4.0, 1.4, 4.0, 4.2], TEN, None),
        ([4.0, 4.0, 4.0, 4.0], TEN, None),
        ([4.0, 4.0, 4.0, 4.0], [10.0, 40.0, 10.0, 10.0], Slow(1, 0.1, 0.4)),  # shares count
        ([0.1, 3.0], [10.0, 10.0], Slow(0, 0.01, 0.155)),
        ([1.0, 3.0], [10.0, 10.0], None),
        ([0.3, 0.2, 4.0, 4.2, 4.1], [10.0] * 5, Slow(1, 0.02, 0.4)),
    ],
)
def test_the_slow_rank(waited, total, expected):
    assert tells(waited, total)
    found = slow_rank(waited, total)
    assert (found is None) == (expected is None)
    if found:
        assert (found.rank, found.share, found.others) == pytest.approx(
            (expected.rank, expected.share, expected.others)
        )


@pytest.mark.parametrize(
    ("waited", "total"),
    [
        ([0.09, 0.0, 0.09], [0.1, 0.1, 0.1]),  # 90 ms
        ([0.4, 0.0, 0.4], [10.0, 10.0, 10.0]),  # 4 %
        ([1.0], [2.0]),
        ([], []),
        ([1.0, 1.0], [0.0, 2.0]),
        ([1.0, 1.0], [2.0]),
    ],
)
def test_too_little_to_tell(waited, total):
    assert not tells(waited, total)


def ended(number: int, slow: int | None, rank: int = 0) -> PrefillEnded:
    """A prefill of four ranks, in which all but the slow one waited 4 s of 10."""
    seconds = {"transport": [0.1 if place == slow else 4.0 for place in range(4)], "total": TEN}
    records = {f"r{number}": {"seconds": seconds, "chunks": 1}}
    return PrefillEnded(prefill=f"{number}:p", rank=rank, seconds=10.0, records=records)


def test_it_takes_several_prefills_in_a_row():
    watched = Stragglers()
    assert [watched.ended(ended(i, 2)) for i in range(IN_A_ROW - 1)] == [None] * (IN_A_ROW - 1)
    warned = watched.ended(ended(9, 2))
    assert warned == Straggler(prefill="9:p", rank=2, ranks=4, share=0.01, others=0.4, prefills=IN_A_ROW)
    again = [watched.ended(ended(i, 2)) for i in range(IN_A_ROW)]
    assert again[:-1] == [None] * (IN_A_ROW - 1) and again[-1].prefills == 2 * IN_A_ROW


@pytest.mark.parametrize("between", [ended(5, None), ended(5, 1)])
def test_another_one_in_between_begins_anew(between):
    watched = Stragglers()
    told = [watched.ended(message) for message in (ended(0, 2), ended(1, 2), between, ended(2, 2), ended(3, 2))]
    assert told == [None] * 5 and watched.ended(ended(4, 2)).rank == 2


def test_what_tells_nothing_is_passed_over():
    watched = Stragglers()
    junk = [{}, {"a": {"schedule": "stock"}}, {"a": {"seconds": {"transport": "x", "total": [1.0]}}}]
    for i, records in enumerate(junk):
        assert watched.ended(ended(i, 2)) is None or i == 2
        assert watched.ended(PrefillEnded(prefill="x", rank=0, seconds=1.0, records=records)) is None
    assert watched._times == 3, "three that told, all of rank 2"
    assert watched.ended(ended(8, 2, rank=1)) is None and watched._times == 3, "one rank tells for all"


def test_chunks_count_once():
    watched = Stragglers()
    first = PrefillEnded(prefill="c:1", rank=0, seconds=1.0, records={"chunked": ended(1, 2).records["r1"]})
    assert watched.ended(first) is None and watched._times == 1
    # the sums still show a slow rank; in this chunk alone all ranks waited 0.5 s of 2
    sums = {"transport": [4.5, 4.5, 0.6, 4.5], "total": [12.0] * 4}
    second = PrefillEnded(prefill="c:2", rank=0, seconds=1.0, records={"chunked": {"seconds": sums, "chunks": 2}})
    assert watched.ended(second) is None and watched._rank == -1
    lost = PrefillEnded(prefill="c:4", rank=0, seconds=1.0, records={"chunked": {"seconds": sums, "chunks": 4}})
    assert watched.ended(lost) is None, "the chunk before was not heard of"


def test_the_hub_tells_it():
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        telling = Publisher(hub.ranks_address)
        for number in range(IN_A_ROW):
            telling.emit(ended(number, 1))
        assert isinstance(hear(subscriber, IN_A_ROW + 1)[-1], Straggler)
        telling.close()
