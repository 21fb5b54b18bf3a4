"""Everything that can be known to fail before a process starts, checked in that order; and the environment of one."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.serving.plugin import MODELS

PROCESSORS = "sglang_mm.serving.processors"
SUPPORTED = ("Qwen2_5_VLForConditionalGeneration",)


@contextmanager
def environment(config: Config) -> Iterator[bool]:
    """Inside, new processes are ours; afterwards the variables are what they were. Yields whether on CPU."""
    from sglang_mm.serving.platform import has_accelerator
    from sglang_mm.serving.selfcheck import check_plugin, check_sglang

    on_cpu = not has_accelerator()
    before = dict(os.environ)
    config.to_env()
    # SGLang then imports its own two hundred models only if ours is not the one asked for
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODELS)
    if config.vision == "frames":
        os.environ["SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"] = PROCESSORS
    if config.cp > 1 and not on_cpu:
        # replicas sample the same token from the same logits; should they not, SGLang settles on one (by NCCL)
        os.environ.setdefault("SYNC_TOKEN_IDS_ACROSS_TP", "1")
    if on_cpu:
        os.environ.setdefault(
            "SGLANG_CPU_OMP_THREADS_BIND", bind_cores(config.world_size, sorted(os.sched_getaffinity(0)))
        )
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


def check_launch(config: Config, model_path: str, *, trust_remote_code: bool, revision: str | None) -> None:
    """Devices and model architecture. Raises ConfigError."""
    import torch

    if torch.cuda.is_available() and config.world_size > torch.cuda.device_count():
        raise ConfigError(
            f"--tp {config.tp} --cp {config.cp} needs {config.world_size} GPUs",
            f"tp x cp <= {torch.cuda.device_count()}, the GPUs of this machine",
            "lower --cp or --tp",
        )
    if config.cp == 1:
        return
    architecture = _architecture(model_path, trust_remote_code, revision)
    if architecture not in SUPPORTED:
        raise ConfigError(
            f"{model_path} is a {architecture}, with --cp {config.cp}",
            ", ".join(SUPPORTED),
            "serve it with --cp 1, where SGLang's own model runs",
        )


def check_port(host: str, port: int) -> None:
    """Raise ConfigError when the server's port is taken, before minutes of loading."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise ConfigError(f"--port {port} on {host} ({error.strerror})", "a free port", "pass another --port") from None


def _architecture(model_path: str, trust_remote_code: bool, revision: str | None) -> str:
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        found = get_config(model_path, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:
        raise ConfigError(
            f"--model-path {model_path} has no readable config.json ({str(error).partition(chr(10))[0]})",
            "a checkpoint directory or a model id of the hub",
            "check the path",
        ) from error
    return (found.architectures or ["unknown"])[0]
