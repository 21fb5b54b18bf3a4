"""How far a batch is: a bar on a terminal, else a line now and then. Errors are told as they come."""

import importlib.util
import json
import sys
import time
from dataclasses import dataclass, field

from sglang_mm.batch import records

PLAIN_EVERY_S, QUIET_EVERY_S = 10.0, 60.0  # a line when something was done, and when nothing was
SHOWN = 300  # characters of an error


@dataclass
class Count:
    """total: items of the input. done, errors: of these so far, with `kept` ones of earlier runs. Times in seconds."""

    total: int
    kept: int
    errors: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    answered: int = 0  # by this run
    begin: float = field(default_factory=time.monotonic)

    def add(self, record: dict) -> None:
        used = records.usage_of(record)
        self.prompt_tokens += used.get("prompt_tokens") or 0
        self.answer_tokens += used.get("completion_tokens") or 0
        self.answered += 1
        self.errors += record["error"] is not None

    @property
    def done(self) -> int:
        return self.kept + self.answered

    def line(self) -> str:
        rate = self.answered / max(1e-9, time.monotonic() - self.begin)
        left = f", {_span((self.total - self.done) / rate)} left" if self.answered and self.done < self.total else ""
        per_s = f"{rate:.2f} items/s" if self.answered else "no answer yet"
        tokens = f"{self.prompt_tokens:,} + {self.answer_tokens:,} tokens"
        return f"{self.done}/{self.total} done, {self.errors} with errors, {per_s}, {tokens}{left}"


class Lines:
    """Plain lines; also what the bar is made of. Used as a context manager around the whole run."""

    def __init__(self, count: Count):
        self.count, self._shown_at, self._shown = count, 0.0, -1

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        """Nothing to tidy up."""

    def start(self) -> None:
        """The clock of items per second: to be called when the server is ready for the first time."""
        self.count.begin = self._shown_at = time.monotonic()

    def say(self, text: str) -> None:
        print(printable(text), flush=True)

    def add(self, record: dict) -> None:
        self.count.add(record)
        if (error := record["error"]) is not None:
            name = record.get("custom_id", record["id"])
            self.say(f"  error  {json.dumps(name, ensure_ascii=False)}  {error['code']}: {error['message'][:SHOWN]}")
        self.show()

    def show(self) -> None:
        """Called after each answer, and once a second."""
        wait = QUIET_EVERY_S if self.count.done == self._shown else PLAIN_EVERY_S
        if time.monotonic() - self._shown_at < wait and self.count.done < self.count.total:
            return
        if self._shown != self.count.total:
            self._shown_at, self._shown = time.monotonic(), self.count.done
            self.say(self.count.line())


class Bar(Lines):
    """The same by the library rich."""

    def __init__(self, count: Count):
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        super().__init__(count)
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, transient=True)
        self._task = self._bar.add_task("", total=count.total)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def show(self) -> None:
        self._bar.update(self._task, completed=self.count.done, description=self.count.line())


def view(count: Count, plain: bool) -> Lines:
    """A bar where there is a terminal and rich is installed."""
    if plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Lines(count)
    return Bar(count)


def printable(text: str) -> str:
    """Without what would move a terminal's cursor: ids and messages are others'."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def _span(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
