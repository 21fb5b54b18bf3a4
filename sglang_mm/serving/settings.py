"""A configuration in SGLang's own terms.

--tp T --cp C   ->   --tp-size T*C --attn-cp-size C --prefill-attention-backend mm_ring ...
"""

from collections.abc import Mapping

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError

REFUSED = {  # SGLang's flags that cannot work with --cp > 1: why, and what to do
    "--attn-cp-size": "it is derived from --cp: pass --cp",
    "--enable-prefill-cp": "it is SGLang's own context parallelism: pass --cp alone",
    "--prefill-attention-backend": "prefill attention is ours: choose the rest with --attention-backend",
    "--dcp-size": "decode context parallelism needs another K/V layout: leave it out",
    "--pp-size": "pipeline parallelism is not supported: raise --tp or --cp instead",
    "--pipeline-parallel-size": "pipeline parallelism is not supported: raise --tp or --cp instead",
    "--speculative-algorithm": "speculative decoding is not supported: leave it out",
    "--enable-lora": "LoRA is not supported: merge the adapter into the weights",
    "--lora-paths": "LoRA is not supported: merge the adapter into the weights",
    "--disaggregation-mode": "prefill/decode disaggregation is not supported: leave it out",
    "--enable-dp-attention": "data-parallel attention is not supported: leave it out",
    "--dp-size": "data parallelism is not supported: start one server per replica",
    "--data-parallel-size": "data parallelism is not supported: start one server per replica",
    "--enable-mixed-chunk": "batches that mix prefill and decode are never sharded: leave it out",
}


def refuse(config: Config, given: Mapping[str, object]) -> None:
    """Raise ConfigError for the first of SGLang's flags (with their dashes) that cannot work at this width.

    given: flag -> value; values that switch nothing on (1, null, False) are let through.
    """
    if config.cp == 1:
        return
    for flag in sorted(set(given) & set(REFUSED)):
        if str(given[flag]) not in ("1", "null", "None", "False"):
            why, _, remedy = REFUSED[flag].partition(": ")
            raise ConfigError(f"{flag} with --cp {config.cp}", f"--cp without it, {why}", remedy)


def flags_in(argv: list[str]) -> dict[str, object]:
    """Flags of a command line with their values; True for one without."""
    found: dict[str, object] = {}
    for word, following in zip(argv, [*argv[1:], "--"]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = value if equals else True if following.startswith("--") else following
    return found


def server_settings(config: Config, *, on_cpu: bool) -> tuple[dict, dict]:
    """SGLang server arguments for a configuration: (those that must be, those that yield to the user's)."""
    must: dict = {"tp_size": config.world_size}
    may: dict = {}
    if config.cp > 1:
        must |= {"attn_cp_size": config.cp, "prefill_attention_backend": "mm_ring"}
        # one chunk: a chunk would attend to a prefix that every rank reads whole
        may |= {"chunked_prefill_size": -1, "disable_prefill_cuda_graph": True}
        # SGLang's defaults kill a prefill of over 5 minutes and reserve a slot table of 2048 longest prompts
        may |= {"watchdog_timeout": 3600, "max_running_requests": 64}
    if on_cpu:
        may |= {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native"}
        may |= {"mm_attention_backend": "sdpa", "disable_cuda_graph": True, "disable_overlap_schedule": True}
        may |= {"max_running_requests": 8, "max_total_tokens": 131072, "mem_fraction_static": 0.3}
    return must, may


def to_argv(config: Config, sglang: list[str], *, on_cpu: bool) -> list[str]:
    """The complete command line for SGLang's own parser."""
    must, may = server_settings(config, on_cpu=on_cpu)
    given = flags_in(sglang)
    settings = must | {name: value for name, value in may.items() if flag_of(name) not in given}
    argv = list(sglang)
    for name, value in settings.items():
        argv += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return argv


def flag_of(name: str) -> str:
    """`tp_size` -> `--tp-size`"""
    return "--" + name.replace("_", "-")
