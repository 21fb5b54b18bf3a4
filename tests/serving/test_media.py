"""Reading media out of SGLang's objects: where frames and their pixels are, and what cannot be read."""

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

from sglang_mm.serving.media import UnreadableMedia, read_media

MERGE, PATCH = 2, 6


def item(modality=Modality.VIDEO, offsets=((3, 14),), grid=((3, 4, 4),), rows=48, **other) -> MultimodalDataItem:
    """One video of 3 frames of 4 x 4 patches, so 12 tokens, at positions 3 to 14."""
    kind = "video" if modality == Modality.VIDEO else "image"
    fields = {"feature": torch.arange(rows * PATCH, dtype=torch.float32).view(rows, PATCH), **other}
    data = {f"{kind}_grid_thw": torch.tensor(grid)} if grid else {}
    return MultimodalDataItem(modality=modality, offsets=list(offsets), model_specific_data=data, **fields)


def read(*items):
    return read_media(MultimodalInputs(mm_items=list(items)), MERGE, PATCH)


def test_text_has_none():
    assert read_media(None, MERGE, PATCH) == ([], [])


def test_pixels_of_each_frame():
    video = item()
    (span,), (source,) = read(video)
    assert (span.start, span.length, span.frames, span.modality) == (3, 12, 3, "video")
    assert torch.equal(torch.cat([source.rows(i, span.frame_length) for i in range(3)]), video.feature)


def test_prompt_order_and_several_videos_in_one_item():
    image = item(Modality.IMAGE, [(20, 23)], [(1, 4, 4)], 16)
    videos = item(offsets=[(3, 14), (30, 33)], grid=[(3, 4, 4), (1, 2, 8)], rows=64)
    spans, sources = read(image, videos)
    assert [(span.start, span.length, span.modality) for span in spans] == [
        (3, 12, "video"), (20, 4, "image"), (30, 4, "video")
    ]  # fmt: skip
    assert torch.equal(sources[2].rows(0, 4), videos.feature[48:])


def test_embeddings_made_by_the_client():
    embeddings = torch.randn(12, 5)
    (span,), (source,) = read(item(feature=None, precomputed_embeddings=embeddings))
    assert torch.equal(source.rows(1, span.frame_length), embeddings[4:8])


def test_equal_pixels_in_another_grid_or_at_other_times_are_another_medium():
    from sglang_mm.serving.processors.qwen2_5_vl import tell_apart

    def key(**data):
        made = item(feature=torch.ones(48, PATCH))
        made.model_specific_data |= data
        made.set_pad_value()
        before = made.pad_value
        tell_apart(made)
        assert made.pad_value != before
        return made.pad_values

    as_it_is = key(second_per_grid_ts=[1.0])
    assert key(second_per_grid_ts=torch.tensor([1.0])) == as_it_is
    others = [key(second_per_grid_ts=[2.0]), key(video_grid_thw=torch.tensor([[3, 2, 8]])), key()]
    assert len({as_it_is, *others}) == 4


@pytest.mark.parametrize(
    "broken",
    [
        {"grid": None},
        {"grid": [(3, 4, 4), (1, 4, 4)]},
        {"grid": [(3, 2, 1)], "offsets": [(3, 3)], "rows": 6},
        {"grid": [(0, 4, 4)]},
        {"offsets": [(3, 13)]},
        {"rows": 47},
        {"feature": torch.zeros(48, PATCH + 1)},
        {"feature": [1.0]},
        {"feature": None, "precomputed_embeddings": [torch.zeros(12, 5)]},
        {"feature": None, "precomputed_embeddings": torch.zeros(11, 5)},
    ],
    ids=str,
)
def test_unreadable(broken):
    with pytest.raises(UnreadableMedia):
        read(item(**broken))
