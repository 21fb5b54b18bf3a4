"""The processor: bytes in, bytes out; each medium becomes as many placeholders as the tower makes tokens of it."""

import numpy as np
import pytest

from sglang_mm.tiny.tokenizer import SPECIAL_IDS, SPECIALS
from sglang_mm.tiny.video import draw_frames

IMAGE_PAD, VIDEO_PAD = SPECIAL_IDS["<|image_pad|>"], SPECIAL_IDS["<|video_pad|>"]


def test_ids_are_bytes_and_special_tokens(planted):
    tokenizer = planted.processor.tokenizer
    text = "naïve 東京 🙂\n\ttabs  and   spaces \x00\x7f"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("".join(SPECIALS))["input_ids"] == list(range(256, 256 + len(SPECIALS)))


@pytest.mark.parametrize(
    "image, video",
    [
        ({"type": "image"}, {"type": "video"}),
        ({"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}),
        ({"type": "image_url", "image_url": {"url": "a"}}, {"type": "video_url", "video_url": {"url": "b"}}),
    ],
)
def test_chat_template_begins_once_and_places_media(planted, image, video):
    parts = [{"type": "text", "text": "A"}, image, video, {"type": "text", "text": "B"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    text = planted.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>B<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("height, width, frames", [(28, 28, 2), (56, 84, 5), (336, 336, 40), (308, 336, 4)])
def test_placeholders_match_the_grid(planted, height, width, frames):
    """No size from one token a frame to SGLang's least of 128 is resized, and 20 seconds pass 2,000 tokens."""
    video = np.stack(list(draw_frames(frames, width, height, seed=0)))
    batch = planted.processor(
        text=["<|vision_start|><|video_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>"],
        videos=[video],
        images=[video[0]],
        return_tensors="pt",
    )
    grids = (frames + 1) // 2
    assert batch["video_grid_thw"].tolist() == [[grids, height // 14, width // 14]]
    assert batch["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    per_grid = (height // 28) * (width // 28)
    assert (batch["input_ids"] == VIDEO_PAD).sum() == grids * per_grid
    assert (batch["input_ids"] == IMAGE_PAD).sum() == per_grid
    assert batch["pixel_values_videos"].shape == (4 * grids * per_grid, 3 * 2 * 14 * 14)
    assert frames < 40 or grids * per_grid > 2000


def test_a_video_of_32k_tokens_keeps_its_size(planted):
    patches = planted.processor.video_processor.get_num_of_video_patches(512, 336, 336, {})
    assert patches // 4 == 256 * 144
