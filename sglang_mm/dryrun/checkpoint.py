"""Sizes of a model from its config.json, and nothing else of the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.memory import ModelSizes
from sglang_mm.parallel.sizes import model_sizes

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
ITEMSIZES = {"float16": 2, "half": 2, "bfloat16": 2, "float32": 4, "float": 4}


def read_config(folder: str) -> dict[str, Any]:
    """Raises ConfigError unless the folder has a config.json of a model that can be sharded."""
    path = Path(folder) / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        remedy = "download the checkpoint, or its config.json alone, and pass the directory"
        raise ConfigError(f"{path}: {error.strerror}", "a directory with a config.json", remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", "the config.json of a checkpoint", "check the path") from error
    if ARCHITECTURE not in (config.get("architectures") or ()):
        given = f"{path}: architectures {config.get('architectures')}"
        raise ConfigError(given, ARCHITECTURE, "pass a Qwen2.5-VL checkpoint")
    return config


def sizes_of(config: Mapping[str, Any], dtype: str = "auto") -> ModelSizes:
    """dtype: as SGLang's --dtype; `auto` is the checkpoint's, and 16 bits for one of fp32. Raises ConfigError for
    numbers that are missing."""
    text = config.get("text_config") or config
    try:
        return model_sizes(config, _itemsize(config, text, dtype))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        given = f"a config.json whose numbers cannot be read ({error!r})"
        raise ConfigError(given, "the sizes of text and vision model", "check the path") from error


def check_width(model: ModelSizes, tp: int) -> None:
    """Raise ConfigError where T ranks cannot share heads and MLP evenly."""
    shared_heads = tp % model.kv_heads if tp > model.kv_heads else model.kv_heads % tp
    if model.heads % tp or model.intermediate % tp or shared_heads:
        given = f"--tp {tp} for {model.heads} heads, {model.kv_heads} K/V heads, {model.intermediate} MLP columns"
        raise ConfigError(given, "a T that divides all of them", "pass --tp 1, and raise --cp instead")


def _itemsize(config: Mapping, text: Mapping, dtype: str) -> int:
    if dtype == "auto":
        own = [each.get(key) for each in (text, config) for key in ("dtype", "torch_dtype")]
        return min(2, ITEMSIZES.get(next(filter(None, own), "bfloat16"), 2))
    if dtype not in ITEMSIZES:
        raise ConfigError(f"--dtype {dtype}", f"auto | {' | '.join(ITEMSIZES)}", "leave it out")
    return ITEMSIZES[dtype]
