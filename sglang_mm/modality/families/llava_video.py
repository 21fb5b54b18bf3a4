"""LLaVA-Video: a newline after every row of every frame, 13 x (13 + 1) = 182 tokens a frame; frames touch.

    p p p N p p p N p p p N p p p N          a video of 2 frames of 2 x 3

Source: LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py, add_token_per_grid (`mm_newline_position` "grid"); 13 is half of
SigLIP's 27 rows under average pooling, 14 under bilinear pooling. Images are those of LLaVA-OneVision. Its checkpoints
name the architecture of LLaVA-OneVision, and SGLang lays them out like that: this family is asked for by its own name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.families.llava_onevision import LlavaOneVision
from sglang_mm.modality.family import Medium, Part, square_frames
from sglang_mm.types import Modality


@dataclass(frozen=True)
class LlavaVideo(LlavaOneVision):
    """frame_side: rows of a pooled frame."""

    frame_side: int = 13

    name = "llava_video"
    models = ()

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        if medium.modality == Modality.IMAGE:
            return super().parts(medium, runs)
        return [square_frames(self, medium, runs, self.frame_side, newline=True)]
