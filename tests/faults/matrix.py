"""The fault matrix over bare ranks: one pool, one hub, a fresh ring per case, and rules that every case must keep.

python -m tests.faults.matrix [--out FILE]     all cases; writes their rows, and the page if asked to
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from sglang_mm.events.hub import EventHub
from sglang_mm.events.messages import Straggler
from sglang_mm.events.subscribing import Subscriber
from tests.faults.pool import Answer, Pool
from tests.faults.ranks import DEADLINE_S, FAULTS, MOMENTS, Case, Report, prepare, run_case
from tests.faults.report import LINES, Row, page, read, record
from tests.faults.stack import CLOSE, LAYERS, SCHEDULES

WHERE = "Bare ranks"
RANKS = 3
CASE_DEADLINE_S = 45.0  # of the parent: a case that works takes 4 s at most
MORE_S = 1.0  # above the deadline, for all survivors to know
ROOM = {"descriptors": 0, "threads": 0, "tensors": 0, "MiB": 24}  # more than before; MiB are the allocator's own
DIES = {"exit": 3, "SIGKILL": -signal.SIGKILL}
OWN_ERROR = {"exception in a kernel": "the kernel failed", "out of memory": "can't allocate memory"}


def all_cases() -> list[Case]:
    """Culprits alternate, so that each rank is one under every schedule."""
    cases = product(enumerate(FAULTS), enumerate(MOMENTS), enumerate(SCHEDULES))
    return [Case(fault, moment, schedule, (f + m + s) % RANKS) for (f, fault), (m, moment), (s, schedule) in cases]


def few_cases() -> list[Case]:
    """Each fault once, spread over moments, schedules and ranks."""
    moments, schedules = list(MOMENTS), list(SCHEDULES)
    wanted = {(fault, moments[i % 3], schedules[(i + i // 3) % 3]) for i, fault in enumerate(FAULTS)}
    return [case for case in all_cases() if (case.fault, case.moment, case.schedule) in wanted]


class Matrix:
    """Runs cases on ranks that it reuses. Use in a `with`. folder: for logs and rendezvous files."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.deaths = Path(folder), 0, 0
        self.hub = EventHub()
        self.listener = Subscriber(self.hub.address)
        self.stragglers: list[Straggler] = []
        self.pool = Pool(RANKS, self.folder)

    def run(self, case: Case) -> tuple[Row, list[str]]:
        """(what happened, which rules it broke)"""
        self._prepare()
        self.number += 1
        rendezvous = str(self.folder / f"ring{self.number}")
        survivors = [rank for rank in range(RANKS) if rank != case.culprit]
        jobs = [(case, rank, RANKS, rendezvous) for rank in range(RANKS)]
        answers = self.pool.run(run_case, jobs, CASE_DEADLINE_S, awaited=survivors)
        if case.fault == "SIGSTOP":
            self.pool.signal(case.culprit, signal.SIGCONT)
        answers |= self.pool.wait([case.culprit], CASE_DEADLINE_S)
        self.deaths += sum(answer.exit_code is not None for answer in answers.values())
        struck = answers[case.culprit].notes
        for rank, answer in answers.items():
            assert not answer.failure, f"{case}, rank {rank}:\n{answer.failure}"
        judge = Judge(case, answers, struck[0] if struck else None)
        broken = [*judge.broken(), *self._straggler_rules(case)]
        return record(judge.row(self.stragglers[-1:] if case.fault == "3x slow" else [])), broken

    def _prepare(self) -> None:
        """Every rank lives and has been heard by a hub that knows nothing else."""
        fresh = self.pool.restore() if self.number else range(RANKS)
        self.hub.forget()
        jobs = [(rank, RANKS, self.hub.environment) for rank in range(RANKS)]
        self.pool.run_on(fresh, prepare, jobs, CASE_DEADLINE_S)
        end = time.monotonic() + 5
        while len(self.hub.beats()) < RANKS:
            assert time.monotonic() < end, f"only ranks {sorted(self.hub.beats())} beat{self.pool.tails()}"
            time.sleep(0.01)

    def _straggler_rules(self, case: Case) -> Iterator[str]:
        """The slow rank is reported, and no other, in no other case."""
        end = time.monotonic() + (2 if case.fault == "3x slow" else 0)
        told = []
        while (event := self.listener.receive(0.05)) is not None or (not told and time.monotonic() < end):
            told += [event] if isinstance(event, Straggler) else []
        self.stragglers += told
        expected = [case.culprit] if case.fault == "3x slow" else []
        if [event.rank for event in told] != expected:
            yield f"stragglers told: {told}, expected {expected}"

    def close(self) -> None:
        self.pool.close()
        self.listener.close()
        self.hub.close()

    def __enter__(self) -> "Matrix":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Judge:
    """Whether a case kept the rules."""

    def __init__(self, case: Case, answers: dict[int, Answer], struck_at: float | None):
        self.case, self.answers, self.struck_at = case, answers, struck_at
        self.reports: dict[int, Report] = {rank: answer.result for rank, answer in answers.items() if answer.result}
        self.survivors = {rank: report for rank, report in self.reports.items() if rank != case.culprit}

    def broken(self) -> list[str]:
        """Rules that were broken, in words."""
        if len(self.survivors) != RANKS - 1:
            return [f"survivors died: {self.answers}"]
        rules = [self._values(), self._released(), self._culprit()]
        rules.append(self._goes_on() if self.case.fault == "3x slow" else self._survivors())
        return [broken for rule in rules for broken in rule]

    def _values(self) -> Iterator[str]:
        for rank, report in self.reports.items():
            if not report.worst < CLOSE:
                yield f"rank {rank}: error {report.worst:.1e} in {report.layers_done} layers"

    def _released(self) -> Iterator[str]:
        for rank, report in self.reports.items():
            before, after = report.before, report.after
            grown = [what for what, more in ROOM.items() if after[what] > before[what] + more]
            if grown:
                yield f"rank {rank} holds more {', '.join(grown)}: {after}, before {before}"

    def _culprit(self) -> Iterator[str]:
        case, answer = self.case, self.answers[self.case.culprit]
        if answer.exit_code != DIES.get(case.fault):
            yield f"the culprit ended with {answer.exit_code}"
        if case.fault in OWN_ERROR and OWN_ERROR[case.fault] not in answer.result.text:
            yield f"the culprit raised {answer.result.text}"
        if case.fault == "SIGSTOP" and answer.result.error != "RingBroken":
            yield f"the culprit came back, and found no broken ring: {answer.result.error or 'no error'}"

    def _goes_on(self) -> Iterator[str]:
        for rank, report in self.reports.items():
            if report.error or report.layers_done < LAYERS:
                yield f"rank {rank} did not finish: {report.text}"

    def _survivors(self) -> Iterator[str]:
        if self.struck_at is None:
            yield "the fault never struck"
            return
        is_digest = self.case.fault == "wrong digest"
        reports = self.reports if is_digest else self.survivors
        for rank, report in reports.items():
            if report.error != ("RankMismatch" if is_digest else "RingBroken"):
                yield f"rank {rank} raised {report.error or 'nothing'}: {report.text}"
            elif is_digest:
                if f"Rank {self.case.culprit} is the one that differs" not in report.text:
                    yield f"rank {rank} does not name the culprit: {report.text}"
            elif report.named != self.case.culprit:
                yield f"rank {rank} names rank {report.named}: {report.text}"
            elif report.layer not in self._layers():
                yield f"rank {rank} says layer {report.layer}, it was {self.case.layer}: {report.text}"
            if report.named_at - self.struck_at > DEADLINE_S + MORE_S:
                yield f"rank {rank} knew after {report.named_at - self.struck_at:.2f} s: {report.text}"

    def _layers(self) -> tuple[int | None, ...]:
        """Which may be named. A rank that fails with an error tells it; where one that is gone was, is known from what
        others had of it: if that was all of a layer, from the next one, or not at all."""
        layer = self.case.layer
        return (layer,) if self.case.fault in OWN_ERROR else (layer, layer + 1, None)

    def row(self, stragglers: list[Straggler]) -> Row:
        case = self.case
        shared = {"where": WHERE, "fault": case.fault, "moment": case.moment, "schedule": case.schedule}
        mib = max(report.after["MiB"] - report.before["MiB"] for report in self.survivors.values())
        after = f"descriptors, threads, tensors as before, {mib:+d} MiB; ring rebuilt on the same ranks"
        if case.fault == "3x slow":
            told = [f"straggler report: rank {s.rank} waits {s.share:.0%}, others {s.others:.0%}" for s in stragglers]
            return Row(**shared, by="the hub", seen=f"values right on all ranks; {', '.join(told)}", afterwards=after)
        if self.struck_at is None or not self.survivors:
            return Row(**shared, seen=str(self.answers)[:300])
        first = min(self.survivors, key=lambda rank: self.survivors[rank].raised_at)
        report = self.survivors[first]
        how = report.cause or ("all numbers compared" if case.fault == "wrong digest" else "deadline")
        return Row(
            **shared,
            by=f"rank {first} in {report.stage}: {how}",
            first_s=round(report.raised_at - self.struck_at, 3),
            all_s=round(max(each.named_at for each in self.survivors.values()) - self.struck_at, 3),
            seen=report.text,
            afterwards=after,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the page of all cases known, as markdown")
    parser.add_argument("--few", action="store_true", help="only the cases of the normal tests")
    arguments = parser.parse_args()
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, Matrix(Path(folder)) as matrix:
        for case in few_cases() if arguments.few else all_cases():
            at = time.monotonic()
            row, broken = matrix.run(case)
            failed += bool(broken)
            seconds = f"{row.first_s} s, {row.all_s} s" if row.first_s is not None else ""
            print(
                f"{case}: {time.monotonic() - at:.1f} s; {seconds} {row.by}; {row.seen}",
                *broken,
                sep="\n    ",
                flush=True,
            )
    print(f"{time.monotonic() - began:.0f} s, {failed} cases broke a rule, {matrix.pool.started} processes started")
    if arguments.out:
        arguments.out.write_text(page(read(LINES)))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
