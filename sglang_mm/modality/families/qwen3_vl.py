"""Qwen3-VL and Qwen3.5: like Qwen2.5-VL, but every frame of a video is wrapped, and its time stands before it.

    < 0.5 seconds > v p p p p e < 1.5 seconds > v p p p p e          a video of 2 frames of 2 x 2

The time is text of uneven length, so the distance between frames varies. Offsets of SGLang are one stretch a frame.
A chat template that puts vision start and end around the video as well adds one of each outside; they stay text.
Source: transformers, models/qwen3_vl/processing_qwen3_vl.py, replace_video_token.
"""

from dataclasses import dataclass

from sglang_mm.modality.families.qwen2_5_vl import Qwen25VL


@dataclass(frozen=True)
class Qwen3VL(Qwen25VL):
    name = "qwen3_vl"
    models = (
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
    )
