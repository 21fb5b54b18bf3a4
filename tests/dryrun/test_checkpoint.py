"""Sizes from config.json: against the parameters that the model has."""

import json

import pytest
import torch

from sglang_mm.dryrun.checkpoint import check_width, read_config, sizes_of
from sglang_mm.errors import ConfigError
from tests.dryrun.checkpoints import SEVEN_B, write_config

PADDED = 32 * (3 * 1280 + 2) * 4
"""SGLang makes the tower's 3,420 columns 3,424: a multiple of 8. Three weights and two biases in 32 layers."""


def parameters(config) -> int:
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        return sum(weight.numel() for weight in Qwen2_5_VLForConditionalGeneration(config).parameters())


def test_seven_billion_are_counted(tmp_path):
    from transformers import Qwen2_5_VLConfig

    read = sizes_of(read_config(write_config(tmp_path)))
    assert read.weights(1) == 2 * (parameters(Qwen2_5_VLConfig.from_dict(SEVEN_B)) + PADDED) == 2 * 8_292_658_432
    assert read.kv_bytes == 57_344 and read.tower.pixels * 4 == 4_704


def test_a_tiny_checkpoint_is_counted_to_the_byte(tmp_path):
    from sglang_mm.tiny import write_checkpoint

    folder = write_checkpoint(tmp_path / "tiny")
    [weights] = folder.glob("*.safetensors")
    read = sizes_of(read_config(str(folder)), "float32")
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    assert read.weights(1) == weights.stat().st_size - header


def test_dtypes(tmp_path):
    config = read_config(write_config(tmp_path))
    sizes = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
    assert {dtype: sizes_of(config, dtype).itemsize for dtype in sizes} == sizes
    assert sizes_of(config | {"torch_dtype": "float32"}).itemsize == 2  # as SGLang loads it
    with pytest.raises(ConfigError, match="--dtype fp7"):
        sizes_of(config, "fp7")


@pytest.mark.parametrize("tp", [1, 2, 4, 28])
def test_widths_that_heads_allow(tmp_path, tp):
    check_width(sizes_of(read_config(write_config(tmp_path, intermediate_size=18816))), tp)


@pytest.mark.parametrize("tp", [3, 8, 14])
def test_widths_that_they_do_not(tmp_path, tp):
    with pytest.raises(ConfigError, match=f"--tp {tp} for 28 heads, 4 K/V heads"):
        check_width(sizes_of(read_config(write_config(tmp_path, intermediate_size=18944))), tp)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"), ("{", "config.json"), ("[]", "config.json"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}), "LlamaForCausalLM"),
        (json.dumps({"architectures": SEVEN_B["architectures"]}), "num_attention_heads"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        sizes_of(read_config(str(tmp_path)))
