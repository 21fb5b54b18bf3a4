"""Qwen2.5-VL with context parallelism and the vision attention it was trained with."""

import copy
from collections.abc import Iterator

import torch
from sglang.srt.models import qwen2_5_vl as stock

from sglang_mm.pixels import StoredPatches
from sglang_mm.serving.context_parallel import ContextParallelMixin
from sglang_mm.serving.embed import PATCHES_PER_CALL


class Qwen2_5_VLForConditionalGeneration(ContextParallelMixin, stock.Qwen2_5_VLForConditionalGeneration):
    """The name equals SGLang's, so that its allow-lists by class name keep working."""

    def get_image_feature(self, items) -> torch.Tensor:
        """Embeddings [tokens, H] of images, for batches that are not sharded; SGLang's, in calls of bounded size."""
        encode = super().get_image_feature
        return torch.cat([encode([self._with_floats(item) for item in some]) for some in _bounded(items)])

    def get_video_feature(self, items) -> torch.Tensor:
        """Frame embeddings [tokens, H] of whole videos, for batches that are not sharded.

        SGLang 0.5.23 lets the full-attention blocks of the tower attend over the whole video; transformers, and
        the model's training, attend inside each frame. One grid row per frame is the complete correction, and lets
        the tower take a few frames at a time.
        """
        if self.mm_config.vision == "stock":
            return super().get_video_feature([self._with_floats(item) for item in items])
        return torch.cat([rows for item in items for rows in self._frames_of(item)])

    def _frames_of(self, item) -> Iterator[torch.Tensor]:
        """Embeddings of some frames of one item after another."""
        grids, low = per_frame(item.video_grid_thw.reshape(-1, 3)), 0
        for some in _calls(grids.prod(-1).tolist()):
            grid = grids[some]
            high = low + int(grid.prod(-1).sum())
            yield self.visual(self._floats(item.feature, low, high), grid_thw=grid)
            low = high

    def _floats(self, feature, low: int, high: int) -> torch.Tensor:
        """Rows [low, high) of an item's pixels on the tower's device, by value or from the store."""
        if isinstance(feature, StoredPatches):
            return feature.part(low, high).all_pixels(self.visual.device, self.visual.dtype)
        return feature[low:high].to(self.visual.dtype)

    def _with_floats(self, item):
        """The item, or a copy of it with floats in the place of a handle."""
        if not isinstance(item.feature, StoredPatches):
            return item
        copied = copy.copy(item)
        copied.feature = self._floats(item.feature, 0, len(item.feature))
        return copied


def _bounded(items: list) -> Iterator[list]:
    """The items, so many at a time that their patches fit into one call of the tower."""
    for some in _calls([len(item.feature) for item in items]):
        yield items[some]


def _calls(patches: list[int]) -> Iterator[slice]:
    """Runs of frames that one call of the tower takes: at most PATCHES_PER_CALL patches, or one frame."""
    first, held = 0, 0
    for i, count in enumerate(patches):
        if i > first and held + count > PATCHES_PER_CALL:
            yield slice(first, i)
            first, held = i, 0
        held += count
    yield slice(first, len(patches))


def per_frame(grid_thw: torch.Tensor) -> torch.Tensor:
    """[[t, h, w], ...] -> one [1, h, w] per frame; patches are frame-major, so their order does not change."""
    frames = grid_thw.repeat_interleave(grid_thw[:, 0], dim=0)
    frames[:, 0] = 1
    return frames


EntryClass = Qwen2_5_VLForConditionalGeneration
