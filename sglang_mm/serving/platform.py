"""SGLang on a machine without an accelerator: the reference platform that tests and the demo run on.

Active only in processes that our launcher configured (see config.ENV) and only where torch finds no accelerator, so
installing this package changes nothing for stock SGLang. Slow and exact, not a production target.
"""

import os
from itertools import pairwise

import torch

from sglang_mm.config import ENV


def has_accelerator() -> bool:
    """Whether torch finds a device that SGLang would serve on."""
    accelerators = ("cuda", "xpu", "npu", "musa", "mps")
    return any(getattr(torch, name, None) is not None and getattr(torch, name).is_available() for name in accelerators)


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: the platform's class name, or None to stay out of the way."""
    if ENV not in os.environ or has_accelerator():
        return None
    return "sglang_mm.serving.cpu_platform.CpuReferencePlatform"


def without_pinned_memory() -> None:
    """SGLang's video path pins unconditionally; where there is no device to pin for, torch raises."""
    torch.Tensor.pin_memory = lambda tensor, *_args, **_kwargs: tensor


def without_cuda_devices() -> None:
    """SGLang's Ray actor chooses its CUDA device unconditionally; where there is none, torch raises."""
    torch.cuda.set_device = lambda device: None


def align_to_model_replica(original, model_config, load_config, tp_size):
    """On CPU SGLang pads head counts to the world size; a model replica spans only the T ranks that split it."""
    from sglang.srt.runtime_context import get_parallel

    return original(model_config, load_config, get_parallel().attn_tp_size)


def last_slots(original, req_to_token, req_pool_indices, prefix_lens):
    """Slot of each request's last cached token, or -1. SGLang asks Triton for it, but for its own CPU backend."""
    last = req_to_token[req_pool_indices, (prefix_lens - 1).clamp(min=0)]
    return torch.where(prefix_lens > 0, last, torch.full_like(prefix_lens, -1))


def segmented_vision_attention(original, self, q, k, v, bsz, cu_seqlens=None, attention_mask=None, **kwargs):
    """Attention inside each segment, [s, h, d] -> [s, h, d], in memory of one segment.

    The stock version masks an S x S matrix: 8K video tokens take over 23 GB.
    """
    if attention_mask is not None or cu_seqlens is None or bsz != 1:
        return original(self, q, k, v, bsz, cu_seqlens=cu_seqlens, attention_mask=attention_mask, **kwargs)
    bounds = cu_seqlens.tolist()
    starts_by_length: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            starts_by_length.setdefault(stop - start, []).append(start)
    out = torch.empty_like(q)
    for length, starts in starts_by_length.items():
        rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        q_, k_, v_ = (x[rows].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, scale=self.scale)
        out[rows] = attended.transpose(1, 2).flatten(0, 1)
    return out
