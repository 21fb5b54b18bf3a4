"""LLaVA-OneVision: a video of 14 x 14 places a frame; a lone image at two sizes; an image among others at one.

    video    p p p p ... p p p p N                      frames touch; one newline closes the video
    one of several images    p p p p ... N              27 x 27, closed by a newline
    lone image    p p p p ... p p p p    p p p N p p p N ...     27 x 27 of all of it, then rows of its tiles

SGLang writes no newline for videos and for one of several images (models/llava.py, pad_input_ids); transformers does
(models/llava_onevision/processing_llava_onevision.py). The count of tokens tells. Grids are in tokens; a lone image's
is (2, rows, columns), for its two sizes. Its two sizes are two items, as an item has frames of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sglang_mm.modality.family import Family, Medium, Part, checked_grid, square_frames
from sglang_mm.modality.token_map import frame_places
from sglang_mm.types import Modality, Place


@dataclass(frozen=True)
class LlavaOneVision(Family):
    """side: rows of the tower's output, image size over patch size. max_tiles: N of `anyres_max_N`."""

    side: int = 27
    max_tiles: int = 9

    name = "llava_onevision"
    models = ("LlavaOnevisionForConditionalGeneration", "llava_onevision", "LlavaQwenForCausalLM", "llava_qwen")

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        if medium.modality == Modality.IMAGE and medium.grid is not None and medium.grid[0] == 2:
            overview = Part(1, (self.side, self.side), frame_places(self.side, self.side))
            if 0 in medium.grid:  # so narrow that nothing is left between the padding
                return [overview]
            _, rows, cols = checked_grid(self, medium)
            return [overview, Part(1, (rows, cols), frame_places(rows, cols, newline=True))]
        side = self.side if medium.modality == Modality.IMAGE else -(-self.side // 2)
        tokens = None if runs is None else sum(runs)
        is_closed = tokens is None or tokens % side**2 == 1
        part = square_frames(self, medium, None if tokens is None else (tokens - is_closed,), side)
        if medium.modality == Modality.IMAGE and part.frames != 1:
            raise self.unknown(medium, runs, "a grid (1, rows, columns), or (2, rows, columns) for a lone image")
        return [replace(part, closing=(Place.NEWLINE,) if is_closed else ())]

    def image_grid(
        self, height: int, width: int, pinpoints: Sequence[tuple[int, int]], tile: int = 384
    ) -> tuple[int, int, int]:
        """The grid of a lone image of height x width pixels: (2, rows, columns).

        pinpoints: sizes in pixels that images may be resized to, `image_grid_pinpoints`. tile: pixels of a tile's side.
        Of the sizes that keep most pixels the smallest is taken; padding is cut off again; what is more than 1.1 times
        as wide as max_tiles tiles in a square is scaled down to them.
        """
        high, wide = max(pinpoints, key=lambda size: _fit(height, width, *size))
        rows, cols = high // tile * self.side, wide // tile * self.side
        if width * rows > cols * height:
            rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
        else:
            cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
        ratio = math.sqrt(rows * cols / (self.max_tiles * self.side**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
        return 2, rows, cols


def _fit(height: int, width: int, high: int, wide: int) -> tuple[int, int]:
    """(pixels kept, less pixels wasted) of an image that is resized into high x wide; the larger the better."""
    scale = min(wide / width, high / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - high * wide
