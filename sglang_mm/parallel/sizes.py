"""Sizes of a model, as its configuration gives them."""

from collections.abc import Mapping
from typing import Any

from sglang_mm.parallel.memory import ModelSizes, Tower


def model_sizes(config: Mapping[str, Any], itemsize: int) -> ModelSizes:
    """config: a Qwen2.5-VL's config.json. itemsize: bytes of a value. Raises KeyError for a number that is missing."""
    text = config.get("text_config") or config
    heads = text["num_attention_heads"]
    return ModelSizes(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=-(-text["vocab_size"] // 64) * 64,  # as SGLang pads it
        positions=text.get("max_position_embeddings") or 32768,
        tied=bool(config.get("tie_word_embeddings")),
        itemsize=itemsize,
        tower=_tower(config["vision_config"]),
    )


def _tower(vision: Mapping) -> Tower:
    channels = vision.get("in_channels") or vision.get("in_chans") or 3
    return Tower(
        layers=vision["depth"],
        hidden=vision["hidden_size"],
        intermediate=vision["intermediate_size"],
        heads=vision["num_heads"],
        pixels=channels * vision.get("temporal_patch_size", 2) * vision.get("patch_size", 14) ** 2,
        merge=vision.get("spatial_merge_size", 2),
    )
