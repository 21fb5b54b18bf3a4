"""The example pictures of the documents.

python -m benchmarks.pictures          writes the PNGs of docs/pictures
"""

from pathlib import Path

from sglang_mm.patterns.boundary import Boundary2D, HeadPlan, NoBoundary
from sglang_mm.patterns.catalog import AShape, Grid, VerticalSlash
from sglang_mm.patterns.pictures import ILLUSTRATION, draw_unit, illustrate
from sglang_mm.plan.geometry import parse_geometry

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
NEAR = AShape(sink=8, window=48)
LINES = Grid(axis="frame", sink=4, window=32, tail=False)
EXAMPLES: dict[str, tuple[str, HeadPlan, str]] = {
    "grid": (
        "A grid: vertical and horizontal lines, one place of every frame",
        NoBoundary(Grid(axis="frame", horizontal=True, sink=4, window=64)),
        "text:20,video:16x6x8,text:40",
    ),
    "vertical_slash": (
        "Vertical lines and slashes",
        NoBoundary(VerticalSlash(vertical=40, slash=256, sink=8, window=64)),
        "text:30,video:24x6x8+newline,text:60",
    ),
    "2d": (
        "A 2d boundary: rows and keys of each modality in their own way",
        Boundary2D(
            {
                **{f"{rows}-text": NEAR for rows in ("text", "image", "video")},
                "image-image": Grid(axis="row", sink=4, window=32, tail=False),
                "text-image": NEAR,
                "video-image": AShape(sink=8, window=128),
                "text-video": LINES,
                "video-video": Grid(axis="frame", horizontal=True, sink=4, window=64, tail=False),
            }
        ),
        "text:60,image:12x16+newline,text:50,video:12x6x8,text:70",
    ),
}
"""File: title, head plan, prompt."""


def main(folder: Path = FOLDER) -> None:
    for name, (title, head_plan, prompt) in EXAMPLES.items():
        tokens = parse_geometry(prompt)
        unit = illustrate(head_plan, tokens)
        file = draw_unit(unit, tokens, folder / f"{name}.png", title=f"{title} ({prompt})", note=ILLUSTRATION)
        print(f"{file} written")


if __name__ == "__main__":
    main()
