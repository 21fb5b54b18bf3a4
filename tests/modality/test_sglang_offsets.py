"""Offsets and ids as SGLang itself makes them, from the output of the real processors: the same map as by ids."""

from array import array

import numpy as np
import pytest
import torch

from sglang_mm.modality import Bundle, Medium, Wraps, family_of, map_from_ids, map_from_offsets
from sglang_mm.types import Modality
from tests.modality import processors
from tests.modality.processors import IMAGE, QWEN_END, QWEN_IDS, QWEN_START, VIDEO, pixels
from tests.modality.script import equal

PLACEHOLDERS = {Modality.IMAGE: QWEN_IDS[IMAGE], Modality.VIDEO: QWEN_IDS[VIDEO]}
WRAPS = Wraps(QWEN_IDS[QWEN_START], QWEN_IDS[QWEN_END])


def prefill(batch) -> tuple[torch.Tensor, list]:
    """(ids with hashes over media, items): what SGLang's processor and scheduler make of a processor's output."""
    from sglang.srt.managers import schedule_batch as sglang
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items, pad_mm_tokens
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    ids, bundled = batch["input_ids"][0], []
    for kind, pixel_name, grid_name in (
        (Modality.IMAGE, "pixel_values", "image_grid_thw"),
        (Modality.VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        item = sglang.MultimodalDataItem(
            modality=sglang.Modality[kind.name],
            feature=batch[pixel_name],
            offsets=BaseMultimodalProcessor.get_mm_items_offset(ids, PLACEHOLDERS[kind]),
            model_specific_data={grid_name: batch[grid_name]},
        )
        bundled.append(item)
    items = get_new_expanded_mm_items(bundled)
    for item in items:
        item.set_pad_value()
    inputs = sglang.MultimodalInputs(
        mm_items=items, im_token_id=PLACEHOLDERS[Modality.IMAGE], video_token_id=PLACEHOLDERS[Modality.VIDEO]
    )
    return torch.tensor(pad_mm_tokens(array("q", ids.tolist()), inputs)), items


def bundle_of(item) -> Bundle:
    kind = Modality.VIDEO if item.is_video() else Modality.IMAGE
    grids = item.model_specific_data[f"{kind.name.lower()}_grid_thw"].tolist()
    return Bundle(item.offsets, [Medium(kind, tuple(grid)) for grid in grids])


def about(frames: int):
    from transformers.video_utils import VideoMetadata

    taken = np.arange(frames) ** 2 * 9
    return VideoMetadata(total_num_frames=1 + int(taken[-1]), fps=10.0, frames_indices=taken, duration=10.0)


@pytest.mark.parametrize(
    ("family", "side", "stretches"), [("qwen2_5_vl", 28, [[1], [1], [2]]), ("qwen3_vl", 32, [[1], [1], [3], [2]])]
)
def test_prefill(family, side, stretches):
    """stretches: offsets of each item. Two videos of Qwen2.5-VL stay one item, of Qwen3-VL they have one per frame."""
    image, video = (f"{QWEN_START}{pad}{QWEN_END}" for pad in (IMAGE, VIDEO))
    videos = [pixels(6, 2 * side, side), pixels(4, side, 3 * side)]
    options = {"video_metadata": [about(6), about(4)], "do_sample_frames": False} if family == "qwen3_vl" else {}
    batch = getattr(processors, family)()(
        text=[f"a{video}bc{image}{image}d{video}e"],
        images=[pixels(side, side), pixels(3 * side, 2 * side)],
        videos=videos,
        return_tensors="pt",
        **options,
    )
    hashed, items = prefill(batch)
    assert [[len(item.offsets)] for item in items] == stretches
    ids = batch["input_ids"][0]
    changed = hashed != ids
    assert torch.equal(changed, sum(ids == token for token in PLACEHOLDERS.values()).bool())
    media = [medium for item in items for medium in bundle_of(item).media]
    by_ids = map_from_ids(family_of(family), ids, media, PLACEHOLDERS, WRAPS)
    assert equal(by_ids, map_from_offsets(family_of(family), hashed, [bundle_of(item) for item in items], WRAPS))
    assert by_ids.grids == ((2, 1), (1, 1), (3, 2), (1, 3)) and torch.equal(changed, by_ids.place >= 0)
