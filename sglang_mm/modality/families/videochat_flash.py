"""VideoChat-Flash: 16 tokens a frame, 64 an image, merged by likeness; frames touch.

    p p p p ... p p p p p p p p          frames of 1 x 16

Tokens of 4 frames are merged to 64 (model's mm_projector_builder.py, ToMe16_mlp_hd64): they have no row or column, and
belong to a frame only in number. So a frame is one row, and its classes are those of the paper's stride of 16 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_mm.modality.family import Family, Medium, Part, checked_grid
from sglang_mm.modality.token_map import frame_places
from sglang_mm.types import Modality


@dataclass(frozen=True)
class VideoChatFlash(Family):
    """frame_tokens, image_tokens: tokens of a frame of a video, and of an image or a tile of it."""

    frame_tokens: int = 16
    image_tokens: int = 64

    name = "videochat_flash"
    models = ("VideoChatFlashQwenForCausalLM", "videochat_flash_qwen")

    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        tokens = self.image_tokens if medium.modality == Modality.IMAGE else self.frame_tokens
        frames, rest = divmod(sum(runs or ()), tokens)
        if medium.grid:
            frames, rows, cols = checked_grid(self, medium)
            rest = rows * cols - tokens
        if rest or not frames:
            raise self.unknown(medium, runs, f"{tokens} tokens a frame")
        return [Part(frames, (1, tokens), frame_places(1, tokens))]
