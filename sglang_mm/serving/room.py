"""How long a prompt may be for what its prefill needs besides K/V: a rank that runs out of memory ends the server."""

import psutil
import torch

from sglang_mm.config import Config
from sglang_mm.parallel.memory import ModelSizes, even_table
from sglang_mm.parallel.sizes import model_sizes

MARGIN = 0.9  # of the free memory: allocators leave holes, and other work goes on
SPARSE_MARGIN = 0.8  # what a selection, its programs and packed keys need beside: some 10% of a prefill


def longest_prefill(model: ModelSizes, config: Config, free_bytes: int, most: int, *, fused: bool) -> int:
    """Tokens, at most `most`, whose prefill takes at most `free_bytes` on a rank (docs/memory.md); K/V not counted."""

    def fits(tokens: int) -> bool:
        return even_table(model, config, tokens, fused=fused).prefill <= free_bytes

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def limit_of(runner, config: Config, most: int) -> int:
    """The same for a rank that has loaded its model. runner: SGLang's ModelRunner. most: what its K/V allow."""
    sizes = model_sizes(runner.model_config.hf_config.to_dict(), runner.dtype.itemsize)
    on_gpu = torch.device(runner.device).type == "cuda"
    margin = SPARSE_MARGIN if config.is_sparse else MARGIN
    return longest_prefill(sizes, config, int(margin * _free_bytes(on_gpu, config)), most, fused=on_gpu)


def _free_bytes(on_gpu: bool, config: Config) -> int:
    """Of this rank; ranks on one CPU share its memory."""
    if not on_gpu:
        return psutil.virtual_memory().available // config.world_size
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
