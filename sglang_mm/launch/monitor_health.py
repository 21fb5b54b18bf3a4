"""What is known of the ranks themselves, from their events: who lives, who failed, who waits for whom and how long."""

import statistics
import time

from sglang_mm.events.messages import Event, Fault, Heartbeat, RankLost, RankWaits, Straggler, Verdict

MISSED_S = 2.0  # four beats
KEPT = 4096
LEAST_S, FEWER = 0.1, 1 / 3  # of the median of seconds waited: below nothing is said; who waits so much less is slow
MESSAGES = Heartbeat | Fault | RankLost | RankWaits | Straggler | Verdict


class Health:
    """By rank. beats: the newest, and when it came (time.monotonic()); waits: the newest; lost: why."""

    def __init__(self):
        self.beats: dict[int, tuple[Heartbeat, float]] = {}
        self.waits: dict[int, RankWaits] = {}
        self.lost: dict[int, str] = {}
        self._verdict: Verdict | None = None

    def apply(self, message: Event) -> list[str]:
        """Take in one event; lines that should be read."""
        if isinstance(message, Heartbeat | RankWaits):
            kept = self.beats if isinstance(message, Heartbeat) else self.waits
            if message.rank in kept or len(kept) < KEPT:
                kept[message.rank] = (message, time.monotonic()) if kept is self.beats else message
            return []
        if isinstance(message, Fault):
            return [f"rank {message.rank} failed: {message.reason}"]
        if isinstance(message, RankLost):
            if len(self.lost) < KEPT:
                self.lost[message.rank] = message.reason
            return [f"rank {message.rank} was lost: {message.reason}"]
        if isinstance(message, Straggler):
            return [
                f"rank {message.rank} is slow: it waited {message.share:.0%} of its prefill, the others "
                f"{message.others:.0%}; {message.prefills} prefills in a row"
            ]
        if isinstance(message, Verdict) and message != self._verdict:
            self._verdict = message
            return [f"the cause is {message}"]
        return []

    def missed(self) -> list[int]:
        """Ranks that beat once and were not heard for MISSED_S, and lost ones."""
        return sorted({*self.lost, *(rank for rank in self.beats if self._age(rank) > MISSED_S)})

    def __str__(self) -> str:
        return "alive  " + "  ".join(self.cells()) if self.beats or self.lost else ""

    def cells(self) -> list[str]:
        """A word or two per rank: the age of its heartbeat, and whom it waits for."""
        return [self._cell(rank) for rank in sorted({*self.beats, *self.lost})]

    def _cell(self, rank: int) -> str:
        if rank in self.lost:
            return f"{rank}: lost"
        beat, age = self.beats[rank][0], self._age(rank)
        waits = f", waits {beat.waits_s:.0f} s for {' '.join(map(str, beat.waits_for))}" if beat.waits_s >= 1 else ""
        return f"{rank}: {age:.1f} s{'!' if age > MISSED_S else ''}{waits}"

    def _age(self, rank: int) -> float:
        return time.monotonic() - self.beats[rank][1]


def wait_tables(waits: dict[int, RankWaits]) -> list[str]:
    """Lines: for each exchange how often and how long each rank has waited since its start, and a histogram."""
    stages = sorted({stage for told in waits.values() for stage in told.stages})
    return [line for stage in stages for line in _table(stage, waits)]


def _table(stage: str, waits: dict[int, RankWaits]) -> list[str]:
    ranks = {rank: told for rank, told in sorted(waits.items()) if stage in told.stages}
    most = max(len(told.stages[stage].bins) for told in ranks.values())
    used = [i for i in range(most) if any(told.stages[stage].bins[i : i + 1] > [0] for told in ranks.values())]
    edges = next(iter(ranks.values())).edges_s
    head = "".join(f"{_edge(edges, i):>10}" for i in used)
    seconds = statistics.median(told.stages[stage].seconds for told in ranks.values())
    width = max(22, len(stage)) + 2
    lines = [f"{stage:<{width}}{'waits':>8}{'seconds':>10}{'longest':>10}{head}"]
    for rank, told in ranks.items():
        waited = told.stages[stage]
        bins = "".join(f"{sum(waited.bins[i : i + 1]):>10,}" for i in used)
        slow = "  the others wait for it" if seconds >= LEAST_S and waited.seconds < FEWER * seconds else ""
        name = f"  rank {rank}{f' {told.node}' if told.node else ''}"
        lines.append(f"{name:<{width}}{waited.count:>8,}{waited.seconds:>10.2f}{waited.longest_s:>10.3f}{bins}{slow}")
    return lines


def _edge(edges: list[float], i: int) -> str:
    if i >= len(edges):
        return "longer"
    return f"<={edges[i]:g} s" if edges[i] >= 1 else f"<={edges[i] * 1000:g} ms"
