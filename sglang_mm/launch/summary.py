"""What a launch says: the topology before any process starts, sizes and the address when it is ready."""

from sglang_mm.config import Config
from sglang_mm.serving.exposure import Exposure

SET_ASIDE = 16  # tokens that SGLang keeps of any limit


def topology(config: Config, model: str, device: str, exposure: Exposure) -> str:
    """Before start-up."""
    sharded = f"prompts of >= {config.cp_min_tokens} new tokens over {config.cp} replicas"
    return "\n".join(
        [
            f"sglang_mm  {model}",
            f"  topology   tp {config.tp} x cp {config.cp} = {config.world_size} ranks on {device}; "
            "weights split over tp, replicated over cp",
            f"  prefill    {'sharded: ' + sharded if config.cp > 1 else 'one replica, not sharded'}"
            + (f"; schedule {config.schedule}" if config.cp > 1 else ""),
            *_sparse(config),
            f"  vision     {_vision(config)}",
            f"  files      requests may name {' and '.join(exposure.readable)}",
            *(f"  WARNING    {warning}" for warning in exposure.warnings),
        ]
    )


def _sparse(config: Config) -> list[str]:
    if not config.is_sparse:
        return ["  sparse     off: every head attends to all keys"]
    if config.sparse == "auto":
        how = "auto: found online for each prompt and head; the first layers and whatever loses recall are dense"
    else:
        how = f"plan {config.sparse}; heads that lose recall are dense"
    return [f"  sparse     {how}; from {config.sparse_min_tokens} new tokens on; kernels {config.kernel_backend}"]


def _vision(config: Config) -> str:
    if config.vision == "stock":
        return (
            "stock: SGLang's values. WARNING: the tower attends over the whole video, on every rank, in time "
            "quadratic in the video's length, and all frames are taken to be 24 a second"
        )
    return "frames: each rank encodes its own frames; attention inside each frame; true video timing"


def _at_rest(config: Config, sizes: dict) -> str:
    if config.cp == 1:
        return ""
    if config.keepers == 1:
        return ", replicated over cp"
    page, many = sizes["kv_page"], config.cp
    return f", sharded over cp: each rank keeps {page // many} of the {page} tokens of a page, {many} times as many fit"


def ready(config: Config, info: dict, url: str) -> str:
    """After start-up. info: what rank 0's scheduler told (max_total_num_tokens and describe_worker's sizes)."""
    sizes = info["sglang_mm"]
    fits = min(info["max_total_num_tokens"], sizes["context_length"])
    bound = "context length" if fits == sizes["context_length"] else "K/V memory"
    kernels = f", tile programs {sizes['tile_backend']}" if "tile_backend" in sizes else ""
    lines = [f"  backends   prefill {sizes['prefill_backend']}, decode {sizes['decode_backend']}{kernels}"]
    if "kv_bytes" in sizes:
        lines.append(
            f"  K/V        {sizes['kv_bytes_per_token']:,} bytes per token ({sizes['layers']} layers x "
            f"{sizes['kv_heads']} K/V heads x {sizes['head_dim']}){_at_rest(config, sizes)}; "
            f"{sizes['kv_bytes'] / 2**30:.2f} GiB per rank"
        )
    lines.append(f"  fits       prompt + answer of up to {fits:,} tokens (bound by {bound})")
    if info["max_req_input_len"] < fits - SET_ASIDE:
        longest = info["max_req_input_len"]
        lines.append(
            f"             prompts of fewer than {longest:,} tokens (bound by the memory that a prefill needs)"
        )
    lines.append(f"sglang_mm is ready at {url}")
    return "\n".join(lines)
