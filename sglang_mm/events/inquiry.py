"""What a hub knows of its ranks, and its one verdict on the first fault: evidence comes in until the answer is certain.

One thread changes it; others may read its fields, which are replaced or copied whole.
"""

import time

from sglang_mm.events.blame import CERTAIN_AT_ONCE, Known, culprit
from sglang_mm.events.messages import Fault, Heartbeat, Verdict
from sglang_mm.events.wire import ASK_WITHIN_S

MOST_RANKS = 1024  # of which something is kept; whoever says to be yet another one is not listened to
SHARE = 0.8  # of the time that asking ranks wait: the rest is for the answer's way
SETTLE_S = 0.15  # until a process that has ended is believed: an ended rank's own words may still be on their way


class Inquiry:
    """heard, told and lost take in evidence; `decide` says when it suffices. Times: time.monotonic()."""

    def __init__(self):
        self.beats: dict[int, tuple[Heartbeat, float]] = {}  # and when it came
        self.faults: dict[int, Fault] = {}
        self.losses: dict[int, str] = {}
        self.verdict: Verdict | None = None
        self.opened_at: float | None = None
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a fault without a verdict."""
        return self.opened_at is not None and self.verdict is None

    def heard(self, beat: Heartbeat) -> None:
        if self._has_room(self.beats, beat.rank):
            self.beats[beat.rank] = beat, time.monotonic()

    def told(self, fault: Fault, within_s: float = ASK_WITHIN_S) -> None:
        """Of a rank only its first fault counts: later ones follow from it."""
        if self._has_room(self.faults, fault.rank):
            self.faults.setdefault(fault.rank, fault)
        self._open(within_s)

    def lost(self, rank: int, reason: str) -> bool:
        """False when that was known."""
        if rank in self.losses or not self._has_room(self.losses, rank):
            return False
        self.losses[rank] = reason
        self._open(ASK_WITHIN_S)
        return True

    def decide(self) -> Verdict | None:
        """The verdict, when it has just been found. It stays, so that all who ask get the same."""
        if not self.is_open:
            return None
        now = time.monotonic()
        found = culprit(Known(self.ages(), dict(self.faults), dict(self.losses)))
        certain = found.what in CERTAIN_AT_ONCE or (found.what == "gone" and now - self.opened_at > SETTLE_S)
        if not certain and now < self._until:
            return None
        self.verdict = found
        return found

    def ages(self) -> dict[int, tuple[Heartbeat, float]]:
        """rank -> newest heartbeat, seconds since it came."""
        now = time.monotonic()
        return {rank: (beat, now - at) for rank, (beat, at) in sorted(dict(self.beats).items())}

    def _open(self, within_s: float) -> None:
        now = time.monotonic()
        until = now + SHARE * within_s
        self._until = until if self.opened_at is None else min(self._until, until)
        self.opened_at = now if self.opened_at is None else self.opened_at

    def _has_room(self, kept: dict, rank: int) -> bool:
        return rank in kept or len(kept) < MOST_RANKS
