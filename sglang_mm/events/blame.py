"""Who is the cause of a fault, from what is known of all ranks: pure, so that one state has one answer.

A rank that raised because it waited blames the rank that it waited for. That one may have failed of its own, have
ended, be stopped, be slow, or wait for a third: blames are followed until they end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sglang_mm.events.messages import STAGES, Fault, Heartbeat, Verdict
from sglang_mm.events.wire import SILENT_AFTER_S

STRENGTH = ("failed", "differ", "gone", "silent", "slow", "circle", "unknown")  # what outweighs what
CERTAIN_AT_ONCE = ("failed", "differ")
LONGEST_TRAIL = 200  # ranks; each is followed once


@dataclass(frozen=True)
class Known:
    """beats: rank -> its newest heartbeat and its age in seconds. faults, losses (why a process is known to have
    ended): by rank, in the order in which they were heard of."""

    beats: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)
    faults: dict[int, Fault] = field(default_factory=dict)
    losses: dict[int, str] = field(default_factory=dict)

    def is_silent(self, rank: int) -> bool:
        """Whether it beat once and no longer does."""
        return rank in self.beats and self.beats[rank][1] > SILENT_AFTER_S

    def waits_for(self, rank: int) -> list[int]:
        """The ranks that it waited for when it was last heard."""
        return self.beats[rank][0].waits_for if rank in self.beats else []

    def place(self, rank: int) -> tuple[int, int]:
        """How far it is in its prefill; of two ranks the lesser one is behind."""
        beat = self.beats[rank][0] if rank in self.beats else Heartbeat(rank=rank)
        return STAGES.index(beat.stage if beat.stage in STAGES else "layers"), beat.layer


def culprit(known: Known) -> Verdict | None:
    """The strongest finding, and of equals the first. None while nobody told a fault or was lost."""
    if not known.faults and not known.losses:
        return None
    found = list(_Trails(known).all())
    if all(STRENGTH.index(each.what) > STRENGTH.index("silent") for each in found):
        found = [*_anywhere(known), *found]  # blames that end nowhere: some other rank may explain them
    if not found and (computing := _computing(known)):
        found.append(_slowest(known, min(computing)))
    found.append(Verdict(rank=None, what="unknown", reason=_unexplained(known)))
    return min(found, key=lambda each: STRENGTH.index(each.what))


class _Trails:
    """Blames, followed from every fault. path: the ranks that led to one, so that circles end and are seen."""

    def __init__(self, known: Known):
        self.known, self._followed, self._circled = known, set(), False

    def all(self) -> Iterator[Verdict]:
        for rank in self.known.faults:
            yield from self._follow(rank, ())

    def _follow(self, rank: int, path: tuple[int, ...]) -> Iterator[Verdict]:
        """What explains that others wait for `rank`, or that it failed."""
        known = self.known
        if rank in self._followed:
            if not self._circled and rank in path:  # one circle tells enough: among many ranks there are very many
                self._circled = True
                yield _circle(known, path[path.index(rank) :])
            return
        if len(path) > LONGEST_TRAIL:
            return
        self._followed.add(rank)
        onward = (*path, rank)
        if rank in known.faults:
            yield from self._from_fault(known.faults[rank], onward)
        elif rank in known.losses:
            # it may have ended because of a rank that it waited for, and that ended before it
            earlier = [r for r in known.waits_for(rank) if (r in known.losses or r in known.faults) and r not in path]
            if not earlier:
                yield _seen(known, rank, "gone", known.losses[rank])
            yield from self._from_ranks(earlier, onward)
        elif rank not in known.beats:
            yield Verdict(rank=rank, what="unknown", reason="nothing was ever heard from it")
        elif known.is_silent(rank):
            yield _silent(known, rank)
        elif known.waits_for(rank):
            yield from self._from_ranks(known.waits_for(rank), onward)
        else:
            yield _slowest(known, rank)

    def _from_fault(self, fault: Fault, onward: tuple[int, ...]) -> Iterator[Verdict]:
        at = {"node": fault.node, "layer": fault.layer, "stage": fault.stage}
        if fault.what == "own":
            yield Verdict(rank=fault.rank, what="failed", reason=fault.reason, **at)
        elif fault.what == "differ":
            yield Verdict(rank=fault.blames, what="differ", reason=fault.reason)
        elif fault.what == "waited":
            blamed = [fault.blames, *fault.silent]
            yield from self._from_ranks([rank for rank in dict.fromkeys(blamed) if rank is not None], onward)

    def _from_ranks(self, ranks: list[int], path: tuple[int, ...]) -> Iterator[Verdict]:
        for rank in ranks:
            yield from self._follow(rank, path)


def _anywhere(known: Known) -> Iterator[Verdict]:
    """Ranks that told nothing, and have ended or fallen silent."""
    for rank, reason in known.losses.items():
        if rank not in known.faults:
            yield _seen(known, rank, "gone", reason)
    ranks = [rank for rank in known.beats if known.is_silent(rank) and rank not in {**known.losses, **known.faults}]
    for rank in sorted(ranks, key=lambda rank: (-known.beats[rank][1], rank)):
        yield _silent(known, rank)


def _slowest(known: Known, blamed: int) -> Verdict:
    """Of the ranks that compute, the one that is furthest behind; the blamed one if none is behind it.

    On GPUs hosts do not wait, so that blames may end too early.
    """
    rank = min([blamed, *_computing(known)], key=lambda rank: (known.place(rank), rank != blamed, rank))
    beat = known.beats[rank][0]
    reason = "alive and still computing" if beat.stage else "alive, idle"
    return Verdict(rank=rank, what="slow", reason=reason, node=beat.node, layer=beat.layer, stage=beat.stage)


def _computing(known: Known) -> list[int]:
    """Ranks that are in a prefill, alive, and wait for nobody."""
    return [
        rank
        for rank, (beat, _) in known.beats.items()
        if beat.stage and not beat.waits_for and rank not in known.faults and not known.is_silent(rank)
    ]


def _circle(known: Known, ranks: tuple[int, ...]) -> Verdict:
    behind = min(ranks, key=lambda rank: (known.place(rank), rank))
    listed = ", ".join(map(str, sorted(ranks)))
    reason = f"ranks {listed} wait for each other: a message was lost, or they hold different plans"
    return _seen(known, behind, "circle", reason)


def _silent(known: Known, rank: int) -> Verdict:
    age = known.beats[rank][1]
    return _seen(known, rank, "silent", f"no sign of life for {age:.1f} s: its process is stopped, or cut off")


def _seen(known: Known, rank: int, what: str, reason: str) -> Verdict:
    """With where the rank was last: as it was heard, or further, by those that wait for it.

    A beat is old by up to its interval; whoever waits for this rank in layer L has all that it sent in layer L - 1.
    """
    beat = known.beats[rank][0] if rank in known.beats else Heartbeat(rank=rank)
    waiting = [(fault.layer, fault.stage) for fault in known.faults.values() if fault.blames == rank]
    waiting += [(b.layer, b.stage) for b, _ in known.beats.values() if b.waits_for[:1] == [rank]]
    waiting = [(layer, stage) for layer, stage in waiting if layer >= 0]
    layer, stage = max((beat.layer, beat.stage), min(waiting, default=(-1, "")), key=lambda at: at[0])
    return Verdict(rank=rank, what=what, reason=reason, node=beat.node, layer=layer, stage=stage)


def _unexplained(known: Known) -> str:
    """The first fault's own words."""
    fault = next(iter(known.faults.values()), None)
    return f"told by rank {fault.rank}: {fault.reason}" if fault else "a rank was lost"
