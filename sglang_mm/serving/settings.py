"""A configuration in SGLang's own terms.

--tp T --cp C   ->   --tp-size T*C --attn-cp-size C --prefill-attention-backend mm_ring ...
"""

from collections.abc import Collection

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.types import page_for

PREFILL_BACKEND, DECODE_BACKEND = "mm_ring", "mm_paged"
CPU_TOKENS = 131072  # K/V slots, times the replicas that share them
MEDIA_MB = 2048  # one download, kept in memory; SGLang's 64 are three minutes of film
NEVER = {  # fields of SGLang's ServerArgs: (value they must keep, why, what to do instead)
    "attn_cp_size": (1, "it is derived from --cp", "pass --cp"),
    "use_ray": (False, "it is derived from --nodes and --ray-address", "pass those"),
    "enable_prefill_cp": (False, "it is SGLang's own context parallelism", "pass --cp alone"),
    "tokenizer_worker_num": (1, "the corrected processor runs in the server's own process", "leave it out"),
    "smg_grpc_mode": (False, "the server speaks HTTP", "leave it out"),
    "grpc_mode": (False, "the server speaks HTTP", "leave it out"),
    "encoder_only": (False, "the vision tower runs on the ranks of the model", "leave it out"),
    "language_only": (False, "the vision tower runs on the ranks of the model", "leave it out"),
}
OURS = {  # the same, but only where prefills are ours: --cp above 1, or --sparse
    "prefill_attention_backend": (None, "prefill attention is ours", "choose the rest with --attention-backend"),
    "dcp_size": (1, "decode context parallelism needs another K/V layout", "leave it out"),
    "pp_size": (1, "pipeline parallelism is not supported", "raise --tp or --cp instead"),
    "speculative_algorithm": (None, "speculative decoding is not supported", "leave it out"),
    "enable_lora": (None, "LoRA is not supported", "merge the adapter into the weights"),
    "lora_paths": (None, "LoRA is not supported", "merge the adapter into the weights"),
    "disaggregation_mode": ("null", "prefill/decode disaggregation is not supported", "leave it out"),
    "enable_dp_attention": (False, "data-parallel attention is not supported", "leave it out"),
    "dp_size": (1, "data parallelism is not supported", "start one server per replica"),
    "nnodes": (1, "it is derived from --nodes", "pass --nodes"),
    "enable_mixed_chunk": (False, "batches that mix prefill and decode are never sharded", "leave it out"),
    "is_embedding": (False, "only generation is sharded", "serve embeddings with --cp 1"),
    "kv_cache_dtype": ("auto", "quantized K/V are not supported", "leave it out"),
}
SHARED_PAGES = {  # the same, but only where replicas share pages of K/V
    "decode_attention_backend": (None, "decoding on sharded K/V is ours", "leave it out, or pass --kv replicated"),
    "enable_hierarchical_cache": (
        False,
        "only K/V on the devices are sharded",
        "leave it out, or pass --kv replicated",
    ),
    "enable_lmcache": (False, "only K/V on the devices are sharded", "leave it out, or pass --kv replicated"),
    "enable_flexkv": (False, "only K/V on the devices are sharded", "leave it out, or pass --kv replicated"),
    "enable_unified_cache_external_linker": (False, "K/V elsewhere are not sharded", "leave it out"),
    "radix_cache_backend": (None, "K/V elsewhere are not sharded", "leave it out, or pass --kv replicated"),
    "enable_unified_memory": (False, "its pool has other pages", "leave it out, or pass --kv replicated"),
    "enable_kv_cache_sharding": (False, "it is SGLang's own sharding of K/V", "leave it out"),
}


def refuse(config: Config, asked) -> None:
    """Raise ConfigError for the first thing the user asked of SGLang that cannot work at this width.

    asked: SGLang's ServerArgs as the user gave them, by flag, alias, config file or keyword.
    """
    rules = NEVER | (OURS if config.computes_prefill else {}) | (SHARED_PAGES if config.keepers > 1 else {})
    for name, (kept, why, remedy) in rules.items():
        value = getattr(asked, name)
        if value != kept and value:
            ours = f"--cp {config.cp}" if config.cp > 1 or name in NEVER else f"--sparse {config.sparse}"
            given = f"{flag_of(name)} {value} with {ours}"
            raise ConfigError(given, f"{flag_of(name)} left out, {why}", remedy)
    if config.keepers > 1:
        _check_pages(config, asked)


def _check_pages(config: Config, asked) -> None:
    """Pages that all ranks share evenly, and chunks of whole pages."""
    page, chunk = asked.page_size or page_for(config.cp), asked.chunked_prefill_size or 0
    if page % config.cp:
        allowed = f"a multiple of --cp {config.cp}: each replica keeps as much of a page"
        raise ConfigError(f"--page-size {page}", allowed, f"leave it out for {page_for(config.cp)}")
    if chunk > 0 and chunk % page:
        allowed = f"a multiple of the {page} tokens of a page of K/V"
        raise ConfigError(f"--chunked-prefill-size {chunk}", allowed, f"pass {max(1, round(chunk / page)) * page}")


def server_settings(config: Config, *, on_cpu: bool) -> tuple[dict, dict]:
    """SGLang server arguments for a configuration: (those that must be, those that yield to the user's)."""
    must: dict = {"tp_size": config.world_size}
    may: dict = {"media_url_max_file_size_mb": MEDIA_MB}
    if config.cp > 1:
        must["attn_cp_size"] = config.cp
    if config.nodes > 1:
        must["nnodes"] = config.nodes
    if config.computes_prefill:
        must["prefill_attention_backend"] = PREFILL_BACKEND
        # one chunk: each one attends to all before it, whose keys or queries travel again
        may |= {"chunked_prefill_size": -1, "disable_prefill_cuda_graph": True}
        # SGLang's defaults kill a prefill of over 5 minutes and reserve a slot table of 2048 longest prompts
        may |= {"watchdog_timeout": 3600, "max_running_requests": 64}
    if config.keepers > 1:
        must |= {"decode_attention_backend": DECODE_BACKEND}
        # a decode step could be captured, but what travels in it has not been captured yet
        may |= {"page_size": page_for(config.cp), "disable_cuda_graph": True}
    if on_cpu:
        may |= {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native"}
        may |= {"mm_attention_backend": "sdpa", "disable_cuda_graph": True, "disable_overlap_schedule": True}
        may |= {"max_running_requests": 8, "max_total_tokens": CPU_TOKENS * config.keepers, "mem_fraction_static": 0.3}
    return must, may


def set_by_user(asked, defaults) -> set[str]:
    """Names of our yielding settings that the user set to something else than SGLang's default."""
    _, may = server_settings(Config(cp=2), on_cpu=True)
    return {name for name in may if getattr(asked, name) != getattr(defaults, name)}


def to_argv(config: Config, sglang: list[str], settled: Collection[str], *, on_cpu: bool) -> list[str]:
    """The complete command line for SGLang's own parser. settled: names that the user has decided."""
    must, may = server_settings(config, on_cpu=on_cpu)
    named = {word.partition("=")[0] for word in sglang}
    yielding = {name: value for name, value in may.items() if name not in settled and flag_of(name) not in named}
    argv = list(sglang)
    for name, value in (must | yielding).items():
        argv += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return argv


def flag_of(name: str) -> str:
    """`tp_size` -> `--tp-size`"""
    return "--" + name.replace("_", "-")
