"""Everything that can be known to fail before a process starts, checked in that order; and the environment of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.patterns.plan import Model
from sglang_mm.serving.plugin import MODELS
from sglang_mm.serving.sparse_method import check_plan, tile_backend

PROCESSORS = "sglang_mm.serving.processors"
SUPPORTED = ("Qwen2_5_VLForConditionalGeneration",)


@contextmanager
def environment(config: Config) -> Iterator[bool]:
    """Inside, new processes are ours; afterwards the variables are what they were. Yields whether on CPU."""
    from sglang_mm.serving.platform import has_accelerator
    from sglang_mm.serving.selfcheck import check_plugin, check_sglang

    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "on"):
        raise ConfigError(
            "SGLANG_RUST_SERVER is set", "SGLang's Python server, which checks requests and media", "unset it"
        )
    on_cpu = not has_accelerator()
    before = dict(os.environ)
    config.to_env()
    # SGLang then imports its own two hundred models only if ours is not the one asked for
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS)
    os.environ["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = PROCESSORS
    if on_cpu:
        os.environ.setdefault(
            "SGLANG_CPU_OMP_THREADS_BIND", bind_cores(config.world_size, sorted(os.sched_getaffinity(0)))
        )
        # SGLang leaves each rank as many threads as there are cores: ranks that share them wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // config.world_size)))
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs seconds here and gains nothing
    try:
        check_sglang()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        check_plugin()
        yield on_cpu
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def bind_cores(ranks: int, cores: list[int]) -> str:
    """One entry per rank: cores of its own while there are enough, else cores are shared in turn.

    >>> bind_cores(2, [0, 1, 2, 3]), bind_cores(3, [0, 1])
    ('0,1|2,3', '0|1|0')
    """
    each = len(cores) // ranks
    if each < 1:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return "|".join(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(ranks))


def check_launch(config: Config, asked, *, on_cpu: bool) -> None:
    """Devices, architecture and sizes of the model. asked: SGLang's ServerArgs. Raises ConfigError."""
    if not on_cpu and not config.uses_ray:  # what nodes have, the cluster tells
        check_devices(config, asked)
    if config.world_size == 1 and not config.is_sparse:
        return
    found = _read_config(asked.model_path, asked.trust_remote_code, asked.revision)
    architecture = (found.architectures or ["unknown"])[0]
    if config.computes_prefill and architecture not in SUPPORTED:
        sparse = f" --sparse {config.sparse}" if config.is_sparse else ""
        raise ConfigError(
            f"{asked.model_path} is a {architecture}, with --cp {config.cp}{sparse}",
            ", ".join(SUPPORTED),
            "serve it with --cp 1 and --sparse off, where SGLang's own model runs",
        )
    if config.is_sparse:
        model = Model.of_config(found.to_dict(), name=asked.model_path)
        check_plan(config, model)
        if not on_cpu and config.kernel_backend == "cpu":
            allowed = "auto, triton, flashinfer, fa4, reference on GPUs"
            raise ConfigError("--kernel-backend cpu", allowed, "pass --kernel-backend auto")
        if on_cpu:  # elsewhere only a rank knows its device
            tile_backend(config, "cpu", torch.float32, model.heads, model.kv_heads, model.head_dim)
    if architecture in SUPPORTED:
        check_sizes(config.tp, found)


def check_devices(config: Config, asked) -> None:
    """As many devices as ranks. Raises ConfigError."""
    last, there = asked.base_gpu_id + (config.world_size - 1) * asked.gpu_id_step, torch.cuda.device_count()
    if torch.cuda.is_available() and last >= there:
        place = f" from --base-gpu-id {asked.base_gpu_id}" if asked.base_gpu_id else ""
        place += f" in steps of {asked.gpu_id_step}" if asked.gpu_id_step != 1 else ""
        raise ConfigError(
            f"--tp {config.tp} --cp {config.cp} needs {config.world_size} GPUs{place}",
            f"tp x cp <= {there}, the GPUs of this machine that CUDA_VISIBLE_DEVICES shows",
            "lower --cp or --tp",
        )


def check_sizes(tp: int, model) -> None:
    """Every layer of the model can be cut in `tp` parts. model: transformers' Qwen2.5-VL config. Raises ConfigError."""
    text, vision = getattr(model, "text_config", model), model.vision_config
    kv = text.num_key_value_heads
    cut = {
        "attention heads": text.num_attention_heads,
        "values of the feed-forward layers": text.intermediate_size,
        "heads of the vision tower": vision.num_heads,
        "values of the vision tower's feed-forward layers": -(-vision.intermediate_size // 8) * 8,  # SGLang pads to 8
    }
    wrong = [f"{count:,} {what}" for what, count in cut.items() if count % tp]
    if max(kv, tp) % min(kv, tp):  # fewer K/V heads than ranks are copied
        wrong.append(f"{kv} K/V heads")
    if wrong:
        widths = [str(t) for t in range(1, 65) if not max(kv, t) % min(kv, t) and not any(n % t for n in cut.values())]
        raise ConfigError(
            f"--tp {tp} for a model with {', '.join(wrong)}", f"--tp {', '.join(widths)}",
            "lower --tp, and raise --cp to use the same devices",
        )  # fmt: skip


def _read_config(model_path: str, trust_remote_code: bool, revision: str | None):
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(model_path, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:
        raise ConfigError(
            f"--model-path {model_path} has no readable config.json ({str(error).partition(chr(10))[0]})",
            "a checkpoint directory or a model id of the hub",
            "check the path",
        ) from error
