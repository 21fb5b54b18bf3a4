"""Causal attention by positions in plain torch: the truth on any device, fp64 included.

T tokens, H heads (Hq query, Hkv key/value), G = Hq / Hkv query heads per key head, D head dim.
"""

import torch
from torch import Tensor

from sglang_mm.kernels.merge import empty_state, state_dtype

SCORES = 1 << 24  # scores held at once: 64 MiB in fp32


def attend(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pos_q: Tensor, pos_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `sglang_mm.kernels.causal_attention`. Rows are taken in tiles, so memory does not grow with Tq * Tk."""
    out, lse = empty_state(q_THD)
    dtype = state_dtype(q_THD.dtype)
    k_HDT, v_HTD = k_THD.to(dtype).permute(1, 2, 0), v_THD.to(dtype).transpose(0, 1)
    seen = torch.searchsorted(pos_k, pos_q, right=True)  # keys 0 .. seen-1 are visible
    tile = max(1, SCORES // max(1, q_THD.shape[1] * len(pos_k)))
    for first in range(0, len(pos_q), tile):
        rows = slice(first, first + tile)
        keys = int(seen[rows][-1])
        if keys:
            q_tile = q_THD[rows].to(dtype) * scale
            out[rows], lse[:, rows] = _attend_tile(q_tile, k_HDT[..., :keys], v_HTD[:, :keys], seen[rows])
    return out, lse


def _attend_tile(q_THD: Tensor, k_HDT: Tensor, v_HTD: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, dim = q_THD.shape
    kv_heads, keys, _ = v_HTD.shape
    group = heads // kv_heads
    q_HXD = q_THD.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * rows, dim)
    scores = (q_HXD @ k_HDT).view(heads, rows, keys)
    hidden = torch.arange(keys, device=scores.device) >= seen.to(scores.device).unsqueeze(-1)
    scores.masked_fill_(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    shift = lse.masked_fill(lse == float("-inf"), 0)  # a row without keys: exp(-inf - 0) = 0, not NaN
    weights = scores.sub_(shift.unsqueeze(-1)).exp_()
    out_HTD = (weights.view(kv_heads, group * rows, keys) @ v_HTD).view(heads, rows, dim)
    return out_HTD.transpose(0, 1), lse
