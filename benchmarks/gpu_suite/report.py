"""What came out: one JSON file with everything, and one Markdown file with a table per step.

Both are written after every step, so that a run that is cut off leaves what it had.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path

import torch

from benchmarks.gpu_suite.budget import Budget
from benchmarks.gpu_suite.facts import Facts
from benchmarks.gpu_suite.targets import verdicts
from benchmarks.gpu_suite.timing import Timing
from sglang_mm.errors import ConfigError

REHEARSAL = "rehearsal, no measurement"
LEGEND = (
    "Times are medians; spread is (slowest - fastest) / median, of so many runs. Density and visited tiles are shares "
    "of the causal pairs. A sparse time is that of index, tables, permutation and kernel together; what is beside the "
    "kernel is a share of it. A kernel's rate counts the tiles that it visits, dense attention's the causal pairs."
)
GREEN, RED, UNFIT = "green", "red", "unfit"


@dataclass(frozen=True)
class Check:
    """status: green, red, or unfit for a backend that says it cannot. error, allowed: of out and of lse."""

    what: str
    backend: str
    status: str
    error: tuple[float, ...] = ()
    allowed: tuple[float, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Measurement:
    """where: what was run. seconds: None for what is counted or computed. figures: what follows, by name and unit."""

    step: str
    where: Mapping[str, object]
    seconds: Timing | None
    figures: Mapping[str, object]


def _nobody() -> None:
    pass


@dataclass
class Report:
    facts: Facts
    size: str
    budget: Budget
    folder: Path
    checks: list[Check] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    tell: Callable[[], None] = _nobody
    """Called after every finding."""

    def __post_init__(self):
        self.name = self._free_name()

    def __getstate__(self) -> dict:
        """Without the one who is told: a process has its own."""
        return vars(self) | {"tell": _nobody}

    def add(self, step: str, where: Mapping[str, object], seconds: Timing | None = None, **figures: object) -> None:
        """Keep a measurement and say so on the terminal."""
        self.measurements.append(Measurement(step, where, seconds, figures))
        time = "" if seconds is None else f" {_seconds(seconds.median)}"
        told = ", ".join(f"{name} {_cell(value)}" for name, value in figures.items())
        print(f"[{self.budget.spent:5.0f} s] {step}: {', '.join(map(str, where.values()))}:{time} {told}", flush=True)
        self.tell()

    def fail(self, what: str, why: str | Exception) -> None:
        """Something that should run did not. Too little memory, and what a library refuses in words, is skipped."""
        is_refused = isinstance(why, torch.OutOfMemoryError | ConfigError)
        if isinstance(why, Exception):
            why = f"{type(why).__name__}: {str(why)[:400]}"
        (self.budget.skipped if is_refused else self.failures).append((what, why))
        print(f"[{self.budget.spent:5.0f} s] {'skipped' if is_refused else 'FAILED'} {what}: {why}", flush=True)
        self.tell()

    def note(self, text: str) -> None:
        """Once, however often it is said."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def red(self) -> list[Check]:
        return [check for check in self.checks if check.status == RED]

    @property
    def is_rehearsal(self) -> bool:
        return self.size == "rehearsal"

    def _free_name(self) -> str:
        """Of both files. A rehearsal's cannot be taken for a result; results of earlier runs are never written over."""
        if self.is_rehearsal:
            return "rehearsal"
        name = f"{self.facts.date}-{self.facts.slug}"
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        return next(each for each in names if not (self.folder / f"{each}.json").exists())

    def write(self) -> Path:
        """Both files; returns the Markdown one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.name}.json").write_text(json.dumps(_finite(self.as_dict()), indent=1) + "\n")
        page = self.folder / f"{self.name}.md"
        page.write_text(self.page())
        return page

    def as_dict(self) -> dict:
        return {
            "kind": REHEARSAL if self.is_rehearsal else "measurement",
            "size": self.size,
            "facts": asdict(self.facts),
            "steps": self.steps,
            "seconds": round(self.budget.spent, 1),
            "checks": [asdict(check) for check in self.checks],
            "targets": [each._asdict() for each in verdicts(self.measurements)],
            "measurements": [asdict(each) for each in self.measurements],
            "skipped": self.budget.skipped,
            "failures": self.failures,
            "notes": self.notes,
        }

    def page(self) -> str:
        facts = self.facts
        head = f"# {facts.device}, {facts.date}" + (f" ({self.size})" if self.size != "full" else "")
        if self.is_rehearsal:
            head = f"# {REHEARSAL[0].upper()}{REHEARSAL[1:]}"
        libraries = ", ".join(f"{name} {version}" for name, version in facts.libraries.items())
        parts = [
            f"{head}\n\n{facts.device} ({facts.capability}, {facts.processors} processors, {facts.memory_gb} GB, "
            f"L2 {facts.l2_mb} MB), driver {facts.driver}, CUDA {facts.cuda}; {libraries}; commit {facts.commit}. "
            f"Absent: {', '.join(facts.absent) or 'nothing'}. Steps: {', '.join(self.steps)}; "
            f"{self.budget.spent:.0f} s.\n\n{LEGEND}",
            self._targets(),
            self._checks(),
        ]
        for step in dict.fromkeys(each.step for each in self.measurements):
            parts.append(f"## {step}\n\n{_table([each for each in self.measurements if each.step == step])}")
        parts.append(_list("Failed", [f"{what}: {why}" for what, why in self.failures]))
        parts.append(_list("Skipped", [f"{what}: {why}" for what, why in self.budget.skipped]))
        parts.append(_list("Notes", self.notes))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _targets(self) -> str:
        lines = [["target", "wanted", "measured", "", "where"], ["---"] * 5, *verdicts(self.measurements)]
        return "## targets\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _checks(self) -> str:
        """Per backend how many checks were green; each red one; why a backend did not run."""
        lines = ["| backend | green | red | unfit |", "|---|---|---|---|"]
        for backend in dict.fromkeys(check.backend for check in self.checks):
            mine = [check for check in self.checks if check.backend == backend]
            counts = [sum(check.status == status for check in mine) for status in (GREEN, RED, UNFIT)]
            lines.append(f"| {backend} | {' | '.join(map(str, counts))} |")
        unfit = dict.fromkeys(f"{check.backend}: {check.why}" for check in self.checks if check.status == UNFIT)
        red = [f"RED {check.backend}, {check.what}: {check.why}" for check in self.red]
        return (
            "## correctness\n\n"
            + "\n".join(lines)
            + "".join(f"\n\n{_list('', part)}" for part in (red, [*unfit]) if part)
        )


def _table(measurements: list[Measurement]) -> str:
    where = list(dict.fromkeys(name for each in measurements for name in each.where))
    figures = list(dict.fromkeys(name for each in measurements for name in each.figures))
    is_timed = any(each.seconds for each in measurements)
    head = [*where, *(["time", "spread"] if is_timed else []), *figures]
    lines = [head, ["---"] * len(head)]
    for each in measurements:
        time = ["", ""]
        if each.seconds:
            time = [_seconds(each.seconds.median), f"{100 * each.seconds.spread:.1f} % of {each.seconds.n}"]
        cells = [_cell(each.where.get(name, "")) for name in where]
        lines.append([*cells, *(time if is_timed else []), *(_cell(each.figures.get(name, "")) for name in figures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return (f"## {title}\n\n" if title else "") + "\n".join(f"- {line}" for line in lines)


def _finite(value: object) -> object:
    """JSON has no infinite numbers: they become text."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
