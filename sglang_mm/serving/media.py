"""Read the media of a request out of SGLang's objects before SGLang drops them (it does so at the embedding step)."""

from dataclasses import dataclass

import torch

from sglang_mm.errors import SglangMMError
from sglang_mm.modality import MediaSpan
from sglang_mm.pixels import StoredPatches


@dataclass(frozen=True)
class MediaSource:
    """Where the pixels of one MediaSpan are: rows [first_row, first_row + frames * h * w) of `feature`.

    feature: [patches, channels * temporal_patch * patch * patch], any float dtype, or a handle to stored bytes, of
    which only what is asked for is read; or, when the client sent embeddings, `embeddings` [tokens, hidden] and
    first_row counts tokens. h, w: patches of a frame.
    """

    feature: torch.Tensor | StoredPatches | None
    embeddings: torch.Tensor | None
    first_row: int
    h: int
    w: int

    def rows(self, index: int, tokens: int) -> torch.Tensor:
        """Patches (or, for client-made embeddings, the `tokens` embedding rows) of frame `index`."""
        if self.embeddings is not None:
            low = self.first_row + index * tokens
            return self.embeddings[low : low + tokens]
        return self.pixels(index)

    def pixels(self, index: int, device=None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Floats [h * w, channels * temporal_patch * patch * patch] of frame `index`."""
        low = self.first_row + index * self.h * self.w
        high = low + self.h * self.w
        if isinstance(self.feature, StoredPatches):
            return self.feature.pixels(low, high, device, dtype)
        return self.feature[low:high].to(device=device, dtype=dtype)


class UnreadableMedia(SglangMMError):
    """Media whose pixels cannot be told apart frame by frame."""


def read_batch(forward_batch, tower) -> list[tuple[list[MediaSpan], list[MediaSource]]]:
    """read_media for every request of a batch. tower: SGLang's vision tower."""
    embed = tower.patch_embed
    patch = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    mm_inputs = forward_batch.mm_inputs or [None] * forward_batch.batch_size
    return [read_media(mm, tower.spatial_merge_size, patch) for mm in mm_inputs]


def read_media(mm_inputs, merge: int, patch: int) -> tuple[list[MediaSpan], list[MediaSource]]:
    """Spans and sources of one request, in prompt order; empty for a text request (mm_inputs None).

    mm_inputs: SGLang's MultimodalInputs; offsets in it are inclusive and absolute. merge: spatial merge size, so
    that a frame of h x w patches has h * w / merge**2 tokens. patch: values of one patch.
    Raises UnreadableMedia when grids, placeholder tokens and pixels disagree, or pixels are neither stored nor in host
    tensors.
    """
    found = []
    for item in mm_inputs.mm_items if mm_inputs is not None else ():
        found += _read_item(item, merge, patch)
    found.sort(key=lambda media: media[0])
    spans = [MediaSpan(i, first, tokens, t, modality) for i, (first, tokens, t, modality, _) in enumerate(found)]
    return spans, [media[-1] for media in found]


def _read_item(item, merge: int, patch: int) -> list[tuple[int, int, int, str, MediaSource]]:
    """(first token, tokens, frames, modality, source) of each image or video that SGLang keeps in one item."""
    modality = "video" if item.is_video() else "image"
    grid = item.model_specific_data.get(f"{modality}_grid_thw")
    rows = item.feature if item.precomputed_embeddings is None else item.precomputed_embeddings
    at_hand = isinstance(rows, StoredPatches) or (isinstance(rows, torch.Tensor) and not rows.is_cuda)
    if grid is None or item.offsets is None or not at_hand:
        raise UnreadableMedia(f"a {modality} without a grid or a marker, or neither stored nor in a host tensor")
    found, row, is_pixels = [], 0, item.precomputed_embeddings is None
    grids = torch.as_tensor(grid).reshape(-1, 3).tolist()
    if len(grids) != len(item.offsets):
        raise UnreadableMedia(f"{len(item.offsets)} {modality} markers for {len(grids)} {modality} grids")
    for (first, last), (t, h, w) in zip(item.offsets, grids):
        tokens = t * h * w // merge**2
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise UnreadableMedia(f"a {modality} grid {t}x{h}x{w} whose sides are not multiples of {merge}")
        if tokens != last - first + 1:
            raise UnreadableMedia(f"{last - first + 1} tokens for a {modality} of {tokens} (grid {t}x{h}x{w})")
        source = MediaSource(rows if is_pixels else None, None if is_pixels else rows, row, h, w)
        found.append((first, tokens, t, modality, source))
        row += t * h * w if is_pixels else tokens
    if len(rows) != row or (is_pixels and rows.shape[1:] != (patch,)):
        raise UnreadableMedia(f"{modality} data of shape {tuple(rows.shape)} for {row} rows of {patch} values")
    return found
