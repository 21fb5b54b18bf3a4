"""What each fault led to: a line of JSON per case, and one page made of all lines.

    python -m tests.faults.report --out docs/fault-matrix.md

Tests append to build/faults.jsonl. Of one case the newest line counts, so the page can be made of several runs.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

LINES = Path(__file__).parents[2] / "build" / "faults.jsonl"
WHERE_ORDER = ("Bare ranks", "Engine and server")  # then other sections as they came
INTRODUCTION = """# Fault matrix

Written by `python -m tests.faults.report` from what the tests saw; [faults.md](faults.md) explains the rules. Seconds
count from the fault. *First* is when the first survivor knew of it, *all* when every survivor had raised and
named the culprit, or when the client had its answer.
"""
HEADER = "| fault | moment | schedule | detected by | first, s | all, s | what was seen | afterwards |"


@dataclass(frozen=True)
class Row:
    """where: the section of the page, such as `Bare ranks`; fault, moment, schedule: as people read them.

    by: who noticed first, and how. first_s, all_s: seconds after the fault. seen: what survivors or clients were told;
    afterwards: what was found released, and what went on.
    """

    where: str
    fault: str
    moment: str = ""
    schedule: str = ""
    by: str = ""
    first_s: float | None = None
    all_s: float | None = None
    seen: str = ""
    afterwards: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        return self.where, self.fault, self.moment, self.schedule


def record(row: Row, lines: Path = LINES) -> Row:
    """Append the row to the file of lines."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    with lines.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    return row


def read(lines: Path = LINES) -> list[Row]:
    """The newest row of each case, cases in the order in which they first came."""
    newest: dict[tuple, Row] = {}
    for line in lines.read_text().splitlines():
        row = Row(**json.loads(line))
        newest[row.case] = row
    return list(newest.values())


def page(rows: Iterable[Row]) -> str:
    """Markdown: a section per `where`, a table in each."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.where, []).append(row)
    parts = [INTRODUCTION]
    known = [where for where in WHERE_ORDER if where in sections]
    for where in dict.fromkeys([*known, *sections]):
        own = sorted(sections[where], key=_as_first_seen(sections[where]))
        parts += [f"## {where}\n", HEADER, "|---|---|---|---|---|---|---|---|", *map(_line, own), ""]
    return "\n".join(parts)


def _as_first_seen(rows: list[Row]) -> Callable[[Row], list[int]]:
    """Cases of one fault together, then of one moment: each in the order in which the section first names them."""
    columns = [list(dict.fromkeys(row.case[i] for row in rows)) for i in (1, 2, 3)]
    return lambda row: [column.index(name) for column, name in zip(columns, row.case[1:])]


def _line(row: Row) -> str:
    seconds = [_seconds(row.first_s), _seconds(row.all_s)]
    cells = [row.fault, row.moment, row.schedule, row.by, *seconds, row.seen, row.afterwards]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", type=Path, default=LINES, help="the rows, one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    arguments.out.write_text(page(read(arguments.lines)))
    print(f"{arguments.out}: {len(read(arguments.lines))} cases")


if __name__ == "__main__":
    main()
