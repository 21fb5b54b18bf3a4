"""What is known of videos being read and of prefills under way, from their events: how far, and how long still."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from sglang_mm.events.messages import (
    STAGES,
    Event,
    LayerDone,
    MediaProgress,
    PrefillEnded,
    PrefillStarted,
    RequestRecord,
    StageDone,
    StageStarted,
)
from sglang_mm.launch.monitor_health import MESSAGES, Health

LATE_S = 2.0  # a rank is late when others are further and nothing was heard from it for so long
KEPT = 4096
HEALTH_CHECK = "HEALTH_CHECK"  # how SGLang's ids of its own requests begin


@dataclass
class Rank:
    """layers: done so far, `seconds` into the prefill, heard of at layer_at. first: layers and seconds when layers were
    first heard of, to tell their speed."""

    stage: str = ""
    layers: int = 0
    seconds: float = 0.0
    layer_at: float = 0.0
    first: tuple[int, float] | None = None
    ended: bool = False
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def place(self) -> tuple[bool, int, int]:
        """What can be compared between ranks."""
        return self.ended, STAGES.index(self.stage) if self.stage in STAGES else -1, self.layers


class Prefill:
    """One batch on all its ranks."""

    def __init__(self, started: PrefillStarted):
        self.started = started
        self.ranks: dict[int, Rank] = {}
        self.records: dict[str, dict] = {}
        self.heard_at = time.monotonic()
        self.seconds = 0.0  # of the slowest rank that ended

    @property
    def done(self) -> float:
        """Share of the layers that the slowest rank has done, 0 to 1."""
        layers = [rank.layers for rank in self._all()]
        return min(1.0, min(layers) / max(1, self.started.layers))

    @property
    def elapsed(self) -> float:
        """Seconds since the start, by the clock of the machine."""
        return max(0.0, time.time() - self.started.at)

    @property
    def left(self) -> float | None:
        """Seconds until the slowest rank has done its layers, at its speed so far; None while that is unknown."""
        guesses = []
        for rank in self._all():
            layers, seconds = rank.first or (0, 0.0)
            if rank.ended:
                continue
            if rank.layers <= layers:
                return None
            each = (rank.seconds - seconds) / (rank.layers - layers)
            ahead = each * (self.started.layers - rank.layers) - min(each, time.monotonic() - rank.layer_at)
            guesses.append(max(0.0, ahead))
        return max(guesses, default=0.0)

    @property
    def stage(self) -> str:
        """Of the rank that is furthest behind."""
        behind = min(self._all(), key=lambda rank: rank.place)
        return "ended" if behind.ended else behind.stage or "starting"

    def late(self) -> list[int]:
        """Ranks that are behind the furthest one and were not heard for LATE_S, those that never started included."""
        ranks, now = self._all(), time.monotonic()
        front = max(rank.place for rank in ranks)
        return [i for i, rank in enumerate(ranks) if rank.place < front and now - rank.heard_at > LATE_S]

    def cells(self) -> list[str]:
        """A word per rank: layers done, or the stage before them; late ones have a mark."""
        late = self.late()
        return [self._cell(rank) + ("!" if i in late else "") for i, rank in enumerate(self._all())]

    def _cell(self, rank: Rank) -> str:
        if rank.ended:
            return "done"
        return str(rank.layers) if rank.layers or rank.stage == "layers" else rank.stage or "-"

    def _all(self) -> list[Rank]:
        """Of ranks that told nothing yet, what is known since the first rank started."""
        return [self.ranks.get(i) or Rank(heard_at=self.heard_at) for i in range(min(self.started.ranks, KEPT))]

    def apply(self, message: Event) -> None:
        """One message of one rank."""
        rank = self.ranks.setdefault(message.rank, Rank())
        rank.heard_at = time.monotonic()
        if isinstance(message, StageStarted):
            rank.stage = message.stage
            if message.stage == "layers":
                rank.first = (0, message.seconds)
        elif isinstance(message, LayerDone):
            rank.stage = message.stage
            rank.layers = max(rank.layers, min(message.layer + 1, message.layers))
            rank.seconds, rank.layer_at = message.seconds, rank.heard_at
            rank.first = rank.first or (rank.layers, message.seconds)
        elif isinstance(message, PrefillEnded):
            rank.ended = True
            self.seconds = max(self.seconds, message.seconds)
            self.records.update(message.records)

    @property
    def ended(self) -> bool:
        return all(rank.ended for rank in self._all())


def reading_left(told: MediaProgress) -> float | None:
    """Seconds until a video is read, at its speed so far; None while that is unknown."""
    return told.seconds / told.done * (told.frames - told.done) if told.done else None


class Board:
    """All prefills under way. `apply` returns a line for each request whose prefill is over.

    reading: the newest of each video that is being read, by request and number. health: of the ranks themselves.

    requests: how many different ones are over. A rank has one prefill at a time, so that its next one ends the last,
    even if that message was lost.
    """

    def __init__(self):
        self.running: dict[str, Prefill] = {}
        self.reading: dict[tuple[str, int], MediaProgress] = {}
        self.health = Health()
        self._told: OrderedDict[str, None] = OrderedDict()
        self.requests = 0

    def apply(self, message: Event) -> list[str]:
        """Take in one event."""
        if isinstance(message, MESSAGES):
            return self.health.apply(message)
        if isinstance(message, MediaProgress):
            return self._read(message)
        if isinstance(message, RequestRecord):
            known = message.request in self._told
            return [] if known else [self._tell(message.request, message.record, f", {message.finish}")]
        if isinstance(message, PrefillStarted):
            lines = self._end_others_of(message)
            for place in [place for place in self.reading if place[0] in message.requests]:
                del self.reading[place]  # should their ends not have been heard of
            if all(rid.startswith(HEALTH_CHECK) for rid in message.requests):
                return lines
            prefill = self.running.setdefault(message.prefill, Prefill(message))
            prefill.apply(message)
            return lines
        if not isinstance(message, StageStarted | StageDone | LayerDone | PrefillEnded):
            return []
        if message.prefill not in self.running:
            return []
        prefill = self.running[message.prefill]
        prefill.apply(message)
        if isinstance(message, PrefillEnded) and message.error:
            del self.running[message.prefill]
            failed = f"failed on rank {message.rank} after {message.seconds:.1f} s: {message.error}"
            return [self._tell(rid, {}, failed) for rid in prefill.started.requests]
        return self._close(prefill) if prefill.ended else []

    def _read(self, message: MediaProgress) -> list[str]:
        if message.request.startswith(HEALTH_CHECK):
            return []
        place = message.request, message.medium
        if message.ended:
            self.reading.pop(place, None)
        elif place in self.reading or len(self.reading) < KEPT:
            self.reading[place] = message
        failed = f"video {message.medium + 1} failed after {message.seconds:.1f} s: {message.error}"
        return [f"{message.request}  {failed}"] if message.error else []

    def _end_others_of(self, message: PrefillStarted) -> list[str]:
        lines = []
        for prefill in list(self.running.values()):
            if prefill.started.prefill != message.prefill and message.rank in prefill.ranks:
                prefill.ranks[message.rank].ended = True
                lines += self._close(prefill) if prefill.ended else []
        return lines

    def _close(self, prefill: Prefill) -> list[str]:
        started = prefill.started
        del self.running[started.prefill]
        of_batch = {
            "schedule": started.schedule,
            "ranks": started.ranks,
            "new_tokens": started.new_tokens,
            "cached_tokens": started.cached_tokens,
            "tokens": started.tokens,
        }
        tail = f": {prefill.seconds:.1f} s" if prefill.seconds else ": its end was not heard of"
        tail = f", after {started.chunk} chunks{tail}" if started.chunk else tail
        return [self._tell(rid, prefill.records.get(rid, of_batch), tail) for rid in started.requests]

    def _tell(self, rid: str, record: dict, tail: str) -> str:
        self.requests += rid not in self._told
        self._told[rid] = None
        while len(self._told) > KEPT:
            self._told.popitem(last=False)
        return f"{rid}  {described(record)}{tail}"


def described(record: dict) -> str:
    """`ring on 2 ranks, 31,204 new tokens (text 42, video 31,162), 0 cached`; empty for an empty record."""
    if not record:
        return ""
    tokens = record.get("tokens")
    by_modality = tokens.items() if isinstance(tokens, dict) else ()
    told = ", ".join(f"{name} {_number(count)}" for name, count in by_modality if count)
    return (
        f"{record.get('schedule')} on {record.get('ranks')} ranks, {_number(record.get('new_tokens'))} new tokens"
        f"{f' ({told})' if told else ''}, {_number(record.get('cached_tokens'))} cached"
    )


def _number(value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
