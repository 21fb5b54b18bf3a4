"""Any other model: frames of the grid, in tokens, with nothing inside them but places.

Without a grid, every stretch of tokens is a frame of one row, if they are equally long: the classes along rows are then
those along frames, so that a grid pattern finds what repeats from frame to frame and nothing else. A medium in one
stretch is a single frame; nothing repeats, and no line is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.family import Family, Medium, Part, checked_grid
from sglang_mm.modality.token_map import frame_places


@dataclass(frozen=True)
class Plain(Family):
    name = "plain"
    models = ()

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        if medium.grid:
            frames, rows, cols = checked_grid(self, medium)
        elif runs and len(set(runs)) == 1:
            frames, rows, cols = len(runs), 1, runs[0]
        else:
            raise self.unknown(medium, runs, "a grid, or frames of the same length in a stretch each")
        return [Part(frames, (rows, cols), frame_places(rows, cols))]
