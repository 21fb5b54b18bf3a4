"""Launches that cannot work, each under the words that docs/bad-input.md lists it by. No process is started."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import sglang_mm
from sglang_mm.config import Config
from sglang_mm.launch.args import parse
from sglang_mm.patterns.boundary import NoBoundary
from sglang_mm.patterns.catalog import AShape
from sglang_mm.patterns.plan import uniform
from sglang_mm.patterns.plan_file import read_model, save
from sglang_mm.serving import port, preflight
from sglang_mm.serving.settings import refuse
from sglang_mm.tiny.checkpoint import build_config

FLAGS = [
    ["--pp-size", "2"], ["--speculative-algorithm", "EAGLE"], ["--enable-lora"], ["--lora-paths", "a=b"],
    ["--disaggregation-mode", "prefill"], ["--enable-dp-attention"], ["--dp-size", "2"], ["--enable-prefill-cp"],
    ["--attn-cp-size", "2"], ["--nnodes", "2"], ["--kv-cache-dtype", "fp8_e4m3"], ["--is-embedding"],
    ["--smg-grpc-mode"], ["--encoder-only"], ["--tokenizer-worker-num", "2"],
    ["--page-size", "33"], ["--chunked-prefill-size", "300"], ["--decode-attention-backend", "torch_native"],
    ["--enable-hierarchical-cache"], ["--enable-kv-cache-sharding"],
]  # fmt: skip
OURS = [
    ["--cp", "0"], ["--tp", "-1"], ["--cp-min-tokens", "0"], ["--deadline", "0"],
    ["--allow-local-media", "/no/such/directory"], ["--sparse", "/no/such/plan.json"], ["--sparse-min-tokens", "0"],
    ["--keep-selections", "/no/such/directory"], ["--nodes", "2"], ["--nodes-deadline", "0"],
]  # fmt: skip


def every(scratch: Path) -> list[tuple[str, Callable[[], object]]]:
    """(what, a call that raises ConfigError). scratch: a directory for files."""
    text_model = scratch / "text-model"
    text_model.mkdir()
    (text_model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    tiny, deeper, plan = tiny_models(scratch)
    return [
        *[(f"`{' '.join(words)}`", lambda words=words: parse(words)) for words in OURS],
        *[(f"`--cp 2 {' '.join(words)}`", lambda words=words: refuse(Config(cp=2), asked(words))) for words in FLAGS],
        ("a plan of another model", lambda: check(deeper, sparse=str(plan))),
        ("heads that share a selection with `--tp` above the K/V heads", lambda: check(tiny, tp=4, sparse=str(plan))),
        ("`--kernel-backend fa4` without a GPU", lambda: check(tiny, sparse=str(plan), kernel_backend="fa4")),
        ("`--sparse auto --pp-size 2`", lambda: refuse(Config(sparse="auto"), asked(["--pp-size", "2"]))),
        ("another architecture with `--sparse auto`", lambda: check(text_model, sparse="auto")),
        ("model that is not there", lambda: check(scratch / "gone", cp=2)),
        ("another architecture with `--cp 2`", lambda: check(text_model, cp=2)),
        ("more ranks than devices", more_ranks_than_devices),
        ("Qwen2.5-VL-7B with `--tp 8`", lambda: preflight.check_sizes(8, seven_billion())),
        ("Qwen2.5-VL-7B with `--tp 7`", lambda: preflight.check_sizes(7, seven_billion())),
        ("port in use", port_in_use),
        ("`Engine(server_args=...)`", lambda: sglang_mm.Engine(server_args=object())),
    ]


def tiny_models(scratch: Path) -> list[Path]:
    """Two checkpoints without weights, of two and of four layers, and a plan for the first one."""
    folders = [scratch / f"tiny-{layers}-layers" for layers in (2, 4)]
    for folder, layers in zip(folders, (2, 4)):
        build_config(planted=True, layers=layers, kv_heads=2).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        (folder / "config.json").write_text(json.dumps(config))
    return [*folders, save(uniform(read_model(folders[0]), NoBoundary(AShape())), scratch / "plan.json")]


def asked(words: list[str]):
    """SGLang's ServerArgs of a command line."""
    assert sglang_mm.Engine  # before SGLang is imported: it decides then on which platform it is
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(["--model-path", "M", *words])


def check(model: Path, **widths) -> None:
    preflight.check_launch(Config(**widths), asked(["--model-path", str(model)]), on_cpu=True)


def more_ranks_than_devices() -> None:
    """On a machine of four GPUs; this one may have none."""
    with mock.patch.multiple("torch.cuda", is_available=lambda: True, device_count=lambda: 4):
        preflight.check_devices(Config(tp=2, cp=4), SimpleNamespace(base_gpu_id=0, gpu_id_step=1))


def seven_billion():
    """Sizes of Qwen/Qwen2.5-VL-7B-Instruct."""
    vision = SimpleNamespace(num_heads=16, intermediate_size=3420)
    text = SimpleNamespace(num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944)
    return SimpleNamespace(text_config=text, vision_config=vision)


def port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, port.kept("127.0.0.1", busy.getsockname()[1], None):
        pass
