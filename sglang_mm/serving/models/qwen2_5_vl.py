"""Qwen2.5-VL with context parallelism and the vision attention it was trained with."""

import torch
from sglang.srt.models import qwen2_5_vl as stock

from sglang_mm.serving.context_parallel import ContextParallelMixin


class Qwen2_5_VLForConditionalGeneration(ContextParallelMixin, stock.Qwen2_5_VLForConditionalGeneration):
    """The name equals SGLang's, so that its allow-lists by class name keep working."""

    def get_video_feature(self, items) -> torch.Tensor:
        """Frame embeddings [tokens, H] of whole videos, for batches that are not sharded.

        SGLang 0.5.23 lets the full-attention blocks of the tower attend over the whole video; transformers, and
        the model's training, attend inside each frame. One grid row per frame is the complete correction.
        """
        if self.mm_config.vision == "stock":
            return super().get_video_feature(items)
        pixels = torch.cat([item.feature for item in items]).to(self.visual.dtype)
        grid = torch.cat([item.video_grid_thw.reshape(-1, 3) for item in items])
        return self.visual(pixels, grid_thw=per_frame(grid))


def per_frame(grid_thw: torch.Tensor) -> torch.Tensor:
    """[[t, h, w], ...] -> one [1, h, w] per frame; patches are frame-major, so their order does not change."""
    frames = grid_thw.repeat_interleave(grid_thw[:, 0], dim=0)
    frames[:, 0] = 1
    return frames


EntryClass = Qwen2_5_VLForConditionalGeneration
