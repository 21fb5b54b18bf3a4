"""Real processors of transformers, made without a network, around the tiny byte tokenizer: a byte is a token."""

from functools import cache

import numpy as np

from sglang_mm.tiny.checkpoint import build_processor
from sglang_mm.tiny.tokenizer import SPECIAL_IDS, build_tokenizer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
QWEN_START, QWEN_END = "<|vision_start|>", "<|vision_end|>"
QWEN_IDS = {name: SPECIAL_IDS[name] for name in (IMAGE, VIDEO, QWEN_START, QWEN_END)}
QWEN3_TOKEN = 32  # pixels of a token's side: 2 patches of 16
INTERN_TILE, INTERN_SIDE = 28, 2


def pixels(*shape: int) -> np.ndarray:
    """Black frames, (..., height, width, 3)."""
    return np.zeros((*shape, 3), np.uint8)


@cache
def qwen2_5_vl():
    return build_processor()


@cache
def qwen3_vl():
    """Frames of 1 to 1024 tokens keep their size."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    least, most = QWEN3_TOKEN**2, 1024 * QWEN3_TOKEN**2
    tokenizer = build_tokenizer()
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, min_pixels=least, max_pixels=most),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size={"shortest_edge": least, "longest_edge": 64 * most}),
        chat_template=tokenizer.chat_template,
    )


@cache
def llava_onevision(side: int):
    """A tower of side x side tokens, the released sizes of tiles."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=side**2,
        vision_feature_select_strategy="full",
    )


@cache
def internvl():
    """Tiles of INTERN_TILE pixels and INTERN_SIDE x INTERN_SIDE tokens."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    size = {"height": INTERN_TILE, "width": INTERN_TILE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=INTERN_SIDE**2,
    )
