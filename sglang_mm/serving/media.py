"""Read the media of a request out of SGLang's objects before SGLang drops them (it does so at the embedding step)."""

from dataclasses import dataclass

import torch

from sglang_mm.errors import SglangMMError
from sglang_mm.modality import MediaSpan


@dataclass(frozen=True)
class MediaSource:
    """Where the pixels of one MediaSpan are: rows [first_row, first_row + frames * h * w) of `feature`.

    feature: [patches, channels * temporal_patch * patch * patch], any float dtype; or, when the client sent
    embeddings, `embeddings` [tokens, hidden] and first_row counts tokens. h, w: patches of a frame.
    """

    feature: torch.Tensor | None
    embeddings: torch.Tensor | None
    first_row: int
    h: int
    w: int

    def rows(self, index: int, tokens: int) -> torch.Tensor:
        """Patches (or, for client-made embeddings, the `tokens` embedding rows) of frame `index`."""
        if self.embeddings is not None:
            low = self.first_row + index * tokens
            return self.embeddings[low : low + tokens]
        patches = self.h * self.w
        low = self.first_row + index * patches
        return self.feature[low : low + patches]


def has_plain_tensors(mm_inputs) -> bool:
    """Whether all pixels or embeddings of a request are tensors, not handles that only SGLang's encoder resolves."""
    items = mm_inputs.mm_items if mm_inputs is not None else ()
    return all(isinstance(item.feature, torch.Tensor) or item.precomputed_embeddings is not None for item in items)


def read_media(mm_inputs, merge: int) -> tuple[list[MediaSpan], list[MediaSource]]:
    """Spans and sources of one request, in prompt order; empty for a text request (mm_inputs None).

    mm_inputs: SGLang's MultimodalInputs; offsets in it are inclusive and absolute. merge: spatial merge size, so
    that a frame of h x w patches has h * w / merge**2 tokens.
    Raises SglangMMError when grid and placeholder tokens disagree.
    """
    found = []
    for item in mm_inputs.mm_items if mm_inputs is not None else ():
        modality = "video" if item.is_video() else "image"
        grids = item.model_specific_data[f"{modality}_grid_thw"].reshape(-1, 3).tolist()
        if len(grids) != len(item.offsets):
            raise SglangMMError(
                f"{len(item.offsets)} {modality} markers for {len(grids)} {modality} grids. Allowed: one marker per "
                f"{modality}. Remedy: give the prompt as many {modality} markers as there are {modality}s."
            )
        row = 0
        for (first, last), (t, h, w) in zip(item.offsets, grids):
            tokens = t * h * w // merge**2
            if tokens != last - first + 1:
                raise SglangMMError(
                    f"{last - first + 1} placeholder tokens for a {modality} of {tokens} tokens (grid {t}x{h}x{w}). "
                    "Allowed: equal numbers. Remedy: let the server's processor expand the markers."
                )
            source = MediaSource(item.feature, item.precomputed_embeddings, row, h, w)
            found.append((first, tokens, t, modality, source))
            row += t * h * w if item.precomputed_embeddings is None else tokens
    found.sort(key=lambda media: media[0])
    spans = [MediaSpan(i, first, tokens, t, modality) for i, (first, tokens, t, modality, _) in enumerate(found)]
    return spans, [media[-1] for media in found]
