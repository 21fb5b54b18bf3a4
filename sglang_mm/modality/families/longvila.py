"""LongVILA and VILA: every frame and every image is followed by an end-of-frame token, 256 + 1 a frame; frames touch.

    p p p p E p p p p E p p p p E          a video of 3 frames of 2 x 2; E is the text "\\n"

The end is part of what replaces the marker of the medium. Source: NVlabs/VILA, llava/model/encoders/video/basic.py and
image/basic.py, `end_tokens`. A grid is in tokens; without one, frames are side x side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.family import Family, Medium, Part, checked_grid
from sglang_mm.modality.token_map import frame_places


@dataclass(frozen=True)
class LongVila(Family):
    """side: rows of a frame after the projector: 448 pixels / 14 / 2. beside: ends that are text to the processor."""

    side: int = 16
    beside: int = 0

    name = "longvila"
    models = ("LlavaLlamaModel", "llava_llama")

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        frames, rows, cols = checked_grid(self, medium) if medium.grid else (0, self.side, self.side)
        tokens = rows * cols + 1 - self.beside
        if not frames:
            frames, rest = divmod(sum(runs or ()), tokens)
            if rest or not frames:
                raise self.unknown(medium, runs, f"{tokens} tokens a frame")
        return [Part(frames, (rows, cols), frame_places(rows, cols, end=1), self.beside)]
