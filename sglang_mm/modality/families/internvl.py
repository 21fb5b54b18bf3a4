"""InternVL and InternS1: frames and tiles of 16 x 16; each frame of a video is wrapped and has its number before it.

    F r a m e 1 : v p p p p e \\n F r a m e 2 : v p p p p e          a video of 2 frames of 2 x 2
    v p p p p p p p p p p p p e                                       an image of 3 tiles, the last a thumbnail

A tile is a frame of its image. To SGLang, all videos of a prompt are one item with a stretch per frame, and no grid:
pass how many frames each has, or they count as one video. Images and videos share a placeholder in transformers, not in
SGLang. Sources: transformers, models/internvl/processing_internvl.py; SGLang, multimodal/processors/internvl.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.family import Family, Medium, Part, square_frames


@dataclass(frozen=True)
class InternVL(Family):
    """side: rows of a tile: image size / patch size * downsample ratio. Grids: (frames or tiles, side, side)."""

    side: int = 16

    name = "internvl"
    models = (
        "InternVLForConditionalGeneration",
        "internvl",
        "InternVLChatModel",
        "internvl_chat",
        "InternS1ForConditionalGeneration",
        "interns1",
    )

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        return [square_frames(self, medium, runs, self.side)]
