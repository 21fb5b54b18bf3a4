"""Maps from what the real processors of transformers return, through both doors, against a script of the prompt.

A prompt is a list of pieces: an int is that many bytes of text, (rows, columns) in tokens an image,
(frames, rows, columns) a video.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_mm.modality import Bundle, Medium, Wraps, family_of, map_from_ids, map_from_offsets
from sglang_mm.types import Axis, Modality, Place
from tests.modality import processors
from tests.modality.processors import IMAGE, QWEN_END, QWEN_IDS, QWEN_START, VIDEO, pixels
from tests.modality.script import HASH, Script, columns_of, equal

PLACEHOLDERS = {Modality.IMAGE: QWEN_IDS[IMAGE], Modality.VIDEO: QWEN_IDS[VIDEO]}
WRAPS = Wraps(QWEN_IDS[QWEN_START], QWEN_IDS[QWEN_END])
PROMPTS = {
    "one frame": [3, (1, 2, 3), 2],
    "image alone": [(2, 3)],
    "adjacent images": [1, (2, 3), (4, 1), (2, 3), 5],
    "video first": [(3, 2, 2), 4],
    "video last": [4, (3, 2, 2)],
    "nothing but a video": [(4, 1, 1)],
    "odd sizes": [2, (2, 1, 5), 2, (7, 1), 1],
    "two videos of two sizes": [2, (2, 2, 3), 80, (3, 3, 2), 2],
    "two videos of one size": [(2, 3, 2), (3, 3, 2), 63],
    "interleaved": [9, (3, 2), 30, (2, 2, 2), 70, (1, 2), (2, 2, 2), 5, (3, 2), 11],
}


def check(family, script, batch, media, placeholders, wraps):
    """Is the script what the processor wrote, and does each door give what the script expects?"""
    ids = batch["input_ids"][0]
    is_media = torch.tensor([token.id is None for token in script.tokens])
    assert torch.equal(sum(ids == token for token in set(placeholders.values())).bool(), is_media)
    at_prefill = torch.where(is_media, HASH, ids)
    bundles = [Bundle(script.offsets(item), [medium]) for item, medium in enumerate(media)]
    by_ids = map_from_ids(family, ids, media, placeholders, wraps)
    by_offsets = map_from_offsets(family, at_prefill, bundles[::-1], wraps)
    assert columns_of(by_ids) == script.expected()
    assert equal(by_ids, by_offsets)
    return by_ids


def grids_of(batch, script) -> list[Medium]:
    """The processor's grids, in the order of the script."""
    grids = {
        Modality.IMAGE: iter(batch.get("image_grid_thw", torch.zeros(0, 3)).tolist()),
        Modality.VIDEO: iter(batch.get("video_grid_thw", torch.zeros(0, 3)).tolist()),
    }
    return [Medium(modality, tuple(next(grids[modality]))) for modality, _ in script.media]


@pytest.mark.parametrize("pieces", PROMPTS.values(), ids=PROMPTS)
def test_qwen2_5_vl(pieces):
    text, images, videos, script = "", [], [], Script()
    for piece in pieces:
        if isinstance(piece, int):
            text += "x" * piece
            script.text(piece)
            continue
        *frames, rows, cols = piece
        text += QWEN_START + (VIDEO if frames else IMAGE) + QWEN_END
        if frames:
            videos.append(pixels(2 * frames[0], 28 * rows, 28 * cols))
            script.start().video(frames[0], rows, cols).end()
        else:
            images.append(pixels(28 * rows, 28 * cols))
            script.start().image(rows, cols).end()
    batch = processors.qwen2_5_vl()(text=[text], images=images or None, videos=videos or None, return_tensors="pt")
    family = family_of("Qwen2_5_VLForConditionalGeneration")
    check(family, script, batch, grids_of(batch, script), PLACEHOLDERS, WRAPS)


def timed_video(frames: int, rows: int, cols: int):
    """(pixels, metadata, texts): a video at 10 fps, frames ever further apart, and what stands before each frame."""
    from transformers.video_utils import VideoMetadata

    taken = np.cumsum(np.arange(1, 2 * frames + 1) ** 2)
    times = [(a + b) / 2 / 10.0 for a, b in taken.reshape(-1, 2).tolist()]
    total = int(taken[-1]) + 1
    metadata = VideoMetadata(total_num_frames=total, fps=10.0, frames_indices=taken, duration=total / 10)
    side = processors.QWEN3_TOKEN
    return pixels(2 * frames, side * rows, side * cols), metadata, [f"<{time:.1f} seconds>" for time in times]


@pytest.mark.parametrize("wrapped", [True, False], ids=["chat template", "bare"])
@pytest.mark.parametrize("pieces", PROMPTS.values(), ids=PROMPTS)
def test_qwen3_vl(pieces, wrapped):
    """The chat template wraps a video whose frames the processor wraps again."""
    text, images, videos, metadata, script = "", [], [], [], Script()
    side = processors.QWEN3_TOKEN
    for piece in pieces:
        if isinstance(piece, int):
            text += "x" * piece
            script.text(piece)
            continue
        *frames, rows, cols = piece
        if not frames:
            text += QWEN_START + IMAGE + QWEN_END
            images.append(pixels(side * rows, side * cols))
            script.start().image(rows, cols).end()
            continue
        video, about, times = timed_video(frames[0], rows, cols)
        videos.append(video)
        metadata.append(about)
        text += QWEN_START + VIDEO + QWEN_END if wrapped else VIDEO
        script = script.start() if wrapped else script
        script.item(Modality.VIDEO, rows, cols)
        for time in times:
            script.text(len(time)).start().frame().end()
        script = script.end() if wrapped else script
    options = {"video_metadata": metadata, "do_sample_frames": False} if videos else {}
    batch = processors.qwen3_vl()(
        text=[text], images=images or None, videos=videos or None, return_tensors="pt", **options
    )
    family = family_of("Qwen3VLForConditionalGeneration")
    media = grids_of(batch, script)
    token_map = check(family, script, batch, media, PLACEHOLDERS, WRAPS)

    # as SGLang bundles what it could not split: all images in one item, all videos in another
    bundles = [
        Bundle(script.offsets(*(i for i, one in enumerate(media) if one.modality == kind)), own)
        for kind in (Modality.IMAGE, Modality.VIDEO)
        if (own := [one for one in media if one.modality == kind])
    ]
    assert equal(token_map, map_from_offsets(family, batch["input_ids"][0], bundles, WRAPS))


def test_qwen3_vl_classes_hold_where_positions_modulo_a_stride_do_not():
    """The paper takes i mod stride for the place in a frame. Times of 13, 14 and 15 bytes leave no stride to take."""
    frames, rows, cols = 12, 2, 3
    video, metadata, times = timed_video(frames, rows, cols)
    assert {len(time) for time in times} == {13, 14, 15}
    batch = processors.qwen3_vl()(
        text=[VIDEO], videos=[video], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    (grid,) = batch["video_grid_thw"].tolist()
    media = [Medium(Modality.VIDEO, tuple(grid))]
    token_map = map_from_ids(family_of("qwen3_vl"), batch["input_ids"][0], media, PLACEHOLDERS, WRAPS)
    of_token = token_map.classes(Axis.FRAME).of_token
    starts = (of_token == 0).nonzero().flatten()
    assert len(starts) == frames and len(starts.diff().unique()) == 3
    for place in range(rows * cols):
        at = (of_token == place).nonzero().flatten()
        assert torch.equal(at, starts + place)
        strides = starts.diff().unique()
        assert all(len((at % stride).unique()) > 1 for stride in strides)


@pytest.mark.parametrize(("side", "frames"), [(27, 3), (3, 1), (3, 5)])
def test_llava_onevision_videos(side, frames):
    """27 x 27 become 14 x 14: 196 tokens a frame, and one newline after the last."""
    processor, pooled = processors.llava_onevision(side), (side + 1) // 2
    batch = processor(text=["ab<video>c<video>"], videos=[pixels(frames, 40, 60)] * 2, return_tensors="pt")
    script = Script().text(2).video(frames, pooled, pooled).closing().text(1).video(frames, pooled, pooled).closing()
    family = replace(family_of("llava_onevision"), side=side)
    for grid in ((frames, pooled, pooled), None):
        token_map = check(
            family,
            script,
            batch,
            [Medium(Modality.VIDEO, grid)] * 2,
            {Modality.VIDEO: processor.video_token_id},
            Wraps(),
        )
    assert side != 27 or len(token_map) == 2 + 196 * frames + 1 + 1 + 196 * frames + 1


def test_llava_onevision_images_among_others():
    """They touch in the prompt, so that the ids alone do not tell where one ends."""
    processor, family = processors.llava_onevision(3), replace(family_of("llava_onevision"), side=3)
    batch = processor(text=["a<image><image>b"], images=[[pixels(60, 90), pixels(60, 60)]], return_tensors="pt")
    script = Script().text(1).image(3, 3).closing().image(3, 3).closing().text(1)
    placeholders = {Modality.IMAGE: processor.image_token_id}
    check(family, script, batch, [Medium(Modality.IMAGE, (1, 3, 3))] * 2, placeholders, Wraps())


SIZES = [
    (60, 90), (90, 60), (384, 384), (500, 1200), (1000, 1000), (2000, 300), (333, 1777), (7, 900), (700, 1900),
    (2000, 2000), (1500, 2200),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_llava_onevision_lone_image(height, width):
    """Its tokens are counted by the processor, and its newlines are where the model's own packing puts them."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    side, processor = 4, processors.llava_onevision(4)
    batch = processor(text=["a<image>b"], images=[pixels(height, width)], return_tensors="pt")
    pinpoints, ids = processor.image_processor.image_grid_pinpoints, batch["input_ids"][0]
    family = replace(family_of("llava_onevision"), side=side)
    media = [Medium(Modality.IMAGE, family.image_grid(height, width, pinpoints[::-1]))]
    token_map = map_from_ids(family, ids, media, {Modality.IMAGE: processor.image_token_id})
    detail = [media[0].grid[1:]] if min(media[0].grid) else []
    assert token_map.grids == ((side, side), *detail) and token_map.item.max() == len(detail)

    vision = SimpleNamespace(image_size=384, patch_size=384 // side)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    high, wide = select_best_resolution((height, width), pinpoints)
    tiles = torch.ones(1 + high * wide // 384**2, side**2, 1)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model, [tiles], torch.tensor([[height, width]]), image_newline=torch.tensor([-1.0])
    )
    assert torch.equal(packed[0].flatten() < 0, token_map.place[1:-1] == Place.NEWLINE)


@pytest.mark.parametrize("frames", [[11], [1], [3, 3]])
def test_internvl(frames):
    """Images and videos share a placeholder; "Frame10: " is longer than "Frame9: "."""
    processor, side, tile = processors.internvl(), processors.INTERN_SIDE, processors.INTERN_TILE
    text, script, media = "abc<IMG_CONTEXT>", Script().text(3), []
    image = pixels(tile, 2 * tile)  # two tiles and a thumbnail
    script.start().item(Modality.IMAGE, side, side).frame().frame().frame().end()
    media.append(Medium(Modality.IMAGE, (3, side, side)))
    for count in frames:
        text += "<video>"
        script.item(Modality.VIDEO, side, side)
        for number in range(1, count + 1):
            script.text(len(f"Frame{number}: ")).start().frame().end()
            script.text(number < count)
        media.append(Medium(Modality.VIDEO, (count, side, side)))
    batch = processor(
        text=[text + "d"], images=[image], videos=[pixels(count, tile, tile) for count in frames], return_tensors="pt"
    )
    placeholders = dict.fromkeys((Modality.IMAGE, Modality.VIDEO), processor.image_token_id)
    wraps = Wraps(processor.start_image_token_id, processor.end_image_token_id)
    family = replace(family_of("InternVLForConditionalGeneration"), side=side)
    token_map = check(family, script.text(1), batch, media, placeholders, wraps)

    # SGLang has one item for all videos and no grids at all
    without = [Bundle(script.offsets(0), [Medium(Modality.IMAGE)])]
    without += [Bundle(script.offsets(1), [Medium(Modality.VIDEO)])] if len(frames) == 1 else [
        Bundle(script.offsets(1, 2), media[1:])
    ]  # fmt: skip
    assert equal(token_map, map_from_offsets(family, batch["input_ids"][0], without, wraps))
