"""Which rank the others wait for. Whoever is slow finds its messages there already: it is the one that waits least."""

import statistics
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sglang_mm.events.messages import PrefillEnded, Straggler

FEWER = 1 / 3  # of the median share: who waits less is slow
LEAST_SHARE, LEAST_S = 0.05, 0.1  # of the median wait: below, differences are noise
IN_A_ROW = 3
REMEMBERED = 256


@dataclass(frozen=True)
class Slow:
    """rank: its place in the lists. share: of its total that it waited; others: the median of all shares."""

    rank: int
    share: float
    others: float


def tells(waited_s: Sequence[float], total_s: Sequence[float]) -> bool:
    """Whether ranks waited long enough to be compared. Of one prefill, one value per rank, in seconds."""
    if len(waited_s) < 2 or len(waited_s) != len(total_s) or min(total_s) <= 0:
        return False
    median = statistics.median(waited_s)
    return median >= LEAST_S and median / statistics.median(total_s) >= LEAST_SHARE


def slow_rank(waited_s: Sequence[float], total_s: Sequence[float]) -> Slow | None:
    """The rank that the others wait for, if there is one; of values that tell something."""
    shares = [waited / total for waited, total in zip(waited_s, total_s)]
    median = statistics.median(shares)
    rank = min(range(len(shares)), key=shares.__getitem__)
    return Slow(rank, shares[rank], median) if shares[rank] < FEWER * median else None


class _Seconds(msgspec.Struct):
    transport: list[float]
    total: list[float]


class _Measured(msgspec.Struct):
    """What is needed of a record."""

    seconds: _Seconds
    chunks: int = 1


class Stragglers:
    """Prefill after prefill: warns when one rank was slow IN_A_ROW times, and again after as many more.

    It looks at the seconds of `transport` in records: on GPUs hosts do not wait, but that stage does.
    """

    def __init__(self):
        self._rank, self._times = -1, 0
        self._earlier: OrderedDict[str, _Measured] = OrderedDict()  # by request: records add up their chunks

    def ended(self, message: PrefillEnded) -> Straggler | None:
        """The records of all ranks are in the message of each; one is listened to."""
        measured = self._measured(message) if message.rank == 0 else None
        if measured is None or not tells(measured.transport, measured.total):
            return None
        found = slow_rank(measured.transport, measured.total)
        if found is None or found.rank != self._rank:
            self._rank, self._times = (found.rank if found else -1), 0
        self._times += 1
        if found is None or self._times % IN_A_ROW:
            return None
        return Straggler(
            prefill=message.prefill,
            rank=found.rank,
            ranks=len(measured.total),
            share=round(found.share, 4),
            others=round(found.others, 4),
            prefills=self._times,
        )

    def _measured(self, message: PrefillEnded) -> _Seconds | None:
        """Of this prefill alone; None without a record that tells."""
        for request, record in message.records.items():
            try:
                measured = msgspec.convert(record, _Measured)
            except msgspec.ValidationError:
                continue
            earlier = self._earlier.pop(request, None)
            self._earlier[request] = measured
            while len(self._earlier) > REMEMBERED:
                self._earlier.popitem(last=False)
            if measured.chunks == 1:
                return measured.seconds
            if earlier is not None and earlier.chunks == measured.chunks - 1:
                return _difference(measured.seconds, earlier.seconds)
        return None


def _difference(later: _Seconds, earlier: _Seconds) -> _Seconds:
    return _Seconds(
        [max(0.0, a - b) for a, b in zip(later.transport, earlier.transport)],
        [a - b for a, b in zip(later.total, earlier.total)],
    )
