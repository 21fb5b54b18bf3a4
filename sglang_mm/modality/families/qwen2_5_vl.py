"""Qwen2-VL and Qwen2.5-VL: frames of any size touch each other, vision start and end around the whole medium.

    v p p p p p p p p p p p p e          a video of 3 frames of 2 x 2

Grids are the processor's `image_grid_thw` and `video_grid_thw`: patches, of which merge x merge make a token. A frame
of the grid is two of the video. Source: transformers, models/qwen2_5_vl/processing_qwen2_5_vl.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.family import Family, Medium, Part, checked_grid
from sglang_mm.modality.token_map import frame_places


@dataclass(frozen=True)
class Qwen25VL(Family):
    """merge: `vision_config.spatial_merge_size`."""

    merge: int = 2

    name = "qwen2_5_vl"
    models = (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
    )

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        if medium.grid is None:
            raise self.unknown(medium, runs, "grid_thw of every image and video")
        frames, rows, cols = checked_grid(self, medium, self.merge)
        return [Part(frames, (rows, cols), frame_places(rows, cols))]
