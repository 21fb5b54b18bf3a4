"""The monitor's three forms: bars in a terminal, plain lines, JSON lines."""

import sys
import time

from sglang_mm.events.messages import Event, MediaProgress, to_json
from sglang_mm.launch.monitor_board import Board, Prefill, reading_left

PLAIN_EVERY_S = 1.0
FRAMES_PER_S = 8
BAR_WIDTH = 24


class JsonView:
    """Every event as one line of JSON."""

    def heard(self, message: Event, lines: list[str]) -> None:
        """Called with each event, and the lines that it completes."""
        print(to_json(message), flush=True)

    def tick(self, board: Board) -> None:
        """Called some times a second."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class PlainView(JsonView):
    """A line per request that ended, and one every second per prefill under way."""

    def __init__(self):
        self._shown_at = 0.0

    def heard(self, message: Event, lines: list[str]) -> None:
        for line in lines:
            print(printable(line), flush=True)

    def tick(self, board: Board) -> None:
        if time.monotonic() - self._shown_at < PLAIN_EVERY_S:
            return
        self._shown_at = time.monotonic()
        for prefill in board.running.values():
            print(printable("  ".join(columns(prefill))), flush=True)
        for told in board.reading.values():
            print(printable("  ".join(filter(None, reading_columns(told)))), flush=True)
        told = str(board.health) if board.running or board.health.missed() else ""  # not of an idle server
        if told:
            print(printable(told), flush=True)


class BarView(JsonView):
    """Live bars below the lines of requests that ended, by the library rich."""

    def __init__(self):
        from rich.live import Live

        self._live = Live(refresh_per_second=FRAMES_PER_S, transient=True)

    def __enter__(self):
        self._live.start()
        return self

    def __exit__(self, *_):
        self._live.stop()

    def heard(self, message: Event, lines: list[str]) -> None:
        from rich.text import Text

        for line in lines:
            self._live.console.print(Text(printable(line)))

    def tick(self, board: Board) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for prefill in board.running.values():
            name, size, percent, *rest = map(printable, columns(prefill))
            bar = ProgressBar(total=1.0, completed=prefill.done, width=BAR_WIDTH)
            style = "bold red" if prefill.late() else ""
            grid.add_row(Text(name), Text(size), bar, Text(percent), *(Text(word, style=style) for word in rest))
        for told in board.reading.values():
            name, size, percent, *rest = map(printable, reading_columns(told))
            bar = ProgressBar(total=max(1, told.frames), completed=told.done, width=BAR_WIDTH)
            grid.add_row(Text(name), Text(size), bar, Text(percent), *map(Text, rest))
        alive = Text(printable(str(board.health)), style="bold red" if board.health.missed() else "dim")
        shown = grid if grid.row_count else Text("no prefill under way", style="dim")
        self._live.update(Group(shown, alive) if alive else shown)


def reading_columns(told: MediaProgress) -> list[str]:
    """The same of a video that is being read."""
    left = reading_left(told)
    return [
        told.request[:12],
        f"video {told.medium + 1}, {told.frames:,} frames",
        f"{told.done / max(1, told.frames):4.0%}",
        "reading",
        "",
        "",
        f"{told.seconds:.0f} s" + (f", {left:.0f} s left" if left is not None else ""),
    ]


def columns(prefill: Prefill) -> list[str]:
    """name, size, percent, stage, ranks, late ones, times."""
    started = prefill.started
    first, more = (started.requests or ["?"])[0], len(started.requests) - 1
    late = prefill.late()
    left = prefill.left
    return [
        f"{first[:12]}{f' +{more}' if more > 0 else ''}",
        f"{started.new_tokens:,} tokens, {started.schedule}",
        f"{prefill.done:4.0%}",
        prefill.stage,
        f"layers {' '.join(prefill.cells())} of {started.layers}",
        f"late: rank {', '.join(map(str, late))}" if late else "",
        f"{prefill.elapsed:.0f} s" + (f", {left:.0f} s left" if left is not None else ""),
    ]


def printable(text: str) -> str:
    """Without what would move a terminal's cursor: ids are the clients'."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def view(plain: bool, json: bool) -> JsonView:
    """The form that was asked for; without a terminal, plain lines."""
    if json:
        return JsonView()
    return PlainView() if plain or not sys.stdout.isatty() else BarView()
