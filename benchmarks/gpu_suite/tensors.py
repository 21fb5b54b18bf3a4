"""Queries, keys and values with structure: noise, and in it what makes each head look where its selection does.

Every head has a direction. Keys on its lines and all its queries lean towards it, so that the lines hold most of the
softmax mass; the rest is normal noise. T rows, K keys, Hq query heads, Hkv K/V heads, D head dim.
"""

import torch
from torch import Tensor

from benchmarks.gpu_suite.prompts import Prompt
from sglang_mm.patterns.chosen import Lines, Phases, Selection

Qkv = tuple[Tensor, Tensor, Tensor]
LOGIT = 6.0
"""By how much the scaled score of a key on a line is above the others."""


def random_qkv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Qkv:
    """q [S, Hq, D], k, v [S, Hkv, D]: normal deviates, so that scaled scores have a standard deviation of 1."""
    draw = torch.Generator(device).manual_seed(seed)
    counts = heads, kv_heads, kv_heads
    return tuple(torch.randn(tokens, count, head_dim, dtype=dtype, device=device, generator=draw) for count in counts)


def plant(qkv: Qkv, prompt: Prompt, selection: Selection, seed: int = 1) -> None:
    """Lean q and k, in place, of heads with lines."""
    q_THD, k_KHD, _ = qkv
    head_dim = q_THD.shape[2]
    draw = torch.Generator().manual_seed(seed)
    step = (LOGIT * head_dim**0.5) ** 0.5
    for unit in selection.units:
        keys = _line_keys(unit.panels[0].chosen, prompt)
        for head in unit.heads:
            direction = torch.randn(head_dim, generator=draw)
            lean = (direction * step / direction.norm()).to(q_THD)
            if len(keys):
                q_THD[:, head] += lean
                k_KHD[keys, head // selection.group] += lean


def _line_keys(chosen, prompt: Prompt) -> Tensor:
    """int64: keys on the lines of a panel."""
    device = prompt.tokens.modality.device
    if isinstance(chosen, Lines):
        return chosen.columns.to(device)
    if isinstance(chosen, Phases):
        of_token = prompt.tokens.classes(chosen.axis).of_token
        return torch.isin(of_token, chosen.classes.to(of_token)).nonzero().flatten()
    return torch.zeros(0, dtype=torch.int64, device=device)


def poison(device: torch.device) -> None:
    """Fill memory that is handed out next, small pieces and large ones, with NaN: rows that nobody writes then show."""
    if device.type == "cuda":
        held = [torch.full((size,), float("nan"), device=device) for size in (*[1 << 16] * 64, 1 << 26)]
        del held
