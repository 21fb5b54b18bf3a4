"""How evenly layouts spread typical prompts: slowest / mean rank in rows and in attended (query, key) pairs.

python -m benchmarks.balance          prints a markdown table; exact counts, no timing
"""

from collections.abc import Callable
from itertools import chain

from sglang_mm.parallel.layout import make_layout
from sglang_mm.types import Layout, Run

FRAME = 264  # tokens of one frame of a 360 x 640 video
WIDTHS = (2, 4, 8)


def prompt(*parts: tuple[int, int, str], start: int = 0) -> list[Run]:
    """Runs that follow one another, from (tokens, frames, modality) each."""
    runs = []
    for length, frames, modality in parts:
        runs.append(Run(start, length, frames, modality))
        start += length
    return runs


def video(frames: int) -> tuple[int, int, str]:
    return frames * FRAME, frames, "video"


def text(tokens: int) -> tuple[int, int, str]:
    return tokens, 1, "text"


def image(tokens: int) -> tuple[int, int, str]:
    return tokens, 1, "image"


def timestamped(frames: int) -> list[tuple[int, int, str]]:
    """A video whose frames each follow a short timestamp."""
    return list(chain.from_iterable((text(7), (FRAME, 1, "video")) for _ in range(frames)))


CASES: dict[str, Callable[[int], list[Run]]] = {
    "text, 256 C tokens": lambda ranks: prompt(text(256 * ranks)),
    "one image": lambda ranks: prompt(text(15), image(4095), text(40)),
    "10 frames": lambda ranks: prompt(text(15), video(10), text(30)),
    "18 frames": lambda ranks: prompt(text(15), video(18), text(30)),
    "50 frames": lambda ranks: prompt(text(15), video(50), text(30)),
    "200 frames + question": lambda ranks: prompt(text(15), video(200), text(500)),
    "333 frames": lambda ranks: prompt(video(333)),
    "100 timestamped frames": lambda ranks: prompt(text(15), *timestamped(100), text(30)),
    "mixed": lambda ranks: prompt(
        text(900), image(1296), text(60), video(77), text(5000), image(300), *timestamped(9), video(400), text(33)
    ),
    "question after 100K cached": lambda ranks: prompt(text(256 * ranks + 77), start=100_003),
    "10 frames after 100K cached": lambda ranks: prompt(video(10), text(30), start=100_003),
}


def imbalance(layout: Layout) -> tuple[float, float]:
    """Slowest / mean rank, in (rows, attended pairs)."""
    rows, pairs = [len(held) for held in layout.rows], layout.attended_pairs()
    return max(rows) * layout.ranks / sum(rows), max(pairs) * layout.ranks / sum(pairs)


def main() -> None:
    print("| prompt | C | new tokens | rows | attended pairs |\n|---|---|---|---|---|")
    for name, runs_of in CASES.items():
        for ranks in WIDTHS:
            layout = make_layout(runs_of(ranks), ranks)
            rows, pairs = imbalance(layout)
            print(f"| {name} | {ranks} | {layout.length} | {rows:.4f} | {pairs:.4f} |")


if __name__ == "__main__":
    main()
