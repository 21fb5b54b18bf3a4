"""Checkpoint folders with a config.json and nothing else."""

import json
from pathlib import Path

SEVEN_B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "in_chans": 3, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
    },
    "vocab_size": 152064,
}  # fmt: skip
"""Qwen2.5-VL-7B's, as far as sizes go, in the form in which it was published."""


def write_config(folder: Path, **changed) -> str:
    (folder / "config.json").write_text(json.dumps(SEVEN_B | changed))
    return str(folder)
