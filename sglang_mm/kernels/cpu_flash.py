"""Causal attention by positions on CPU, built from PyTorch's flash kernel.

Positions ascend, so the keys of a tile of queries fall in three parts, and only the middle one needs a mask:

    keys   [ FULL: before the first query | PARTIAL: seen by some rows | after the last query ]
             one call, no mask              one small call               skipped

A tile is cut short where its PARTIAL part would grow wide, as at the jump between two zigzag pieces.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_mm.kernels.merge import empty_state, merge, state_dtype

TILE = 1024  # query rows; 256 and 512 are 10-25% slower, larger ones mask more and gain nothing
PARTIAL_KEYS = 2 * TILE


def attend(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pos_q: Tensor, pos_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `sglang_mm.kernels.causal_attention`. 16-bit inputs are widened, since the kernel would round its output."""
    out, lse = empty_state(q_THD)
    dtype = state_dtype(q_THD.dtype)
    q, k, v = (x.to(dtype) for x in (q_THD, k_THD, v_THD))
    before = torch.searchsorted(pos_k, pos_q)
    seen = torch.searchsorted(pos_k, pos_q, right=True)
    for first, last in _tiles(before, seen):
        rows = slice(first, last)
        full, stop = int(before[first]), int(seen[last - 1])
        if full:
            out[rows], lse[:, rows] = _flash(q[rows], k[:full], v[:full], scale)
        if stop > full:
            keys = slice(full, stop)
            diagonal = torch.equal(pos_k[keys], pos_q[rows])
            visible = None if diagonal else seen[rows] - full
            merge(out[rows], lse[:, rows], *_flash(q[rows], k[keys], v[keys], scale, diagonal, visible))
    return out, lse


def _tiles(before: Tensor, seen: Tensor) -> Iterator[tuple[int, int]]:
    """[first, last) of tiles of at most TILE queries and PARTIAL_KEYS keys in their middle part (a row has one)."""
    first, rows = 0, len(seen)
    while first < rows:
        narrow = int(torch.searchsorted(seen, int(before[first]) + PARTIAL_KEYS, right=True))
        last = min(max(narrow, first + 1), first + TILE, rows)
        yield first, last
        first = last


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One kernel call, at least one key. visible: int64 [T], each row sees keys 0 .. visible-1; None: all."""
    mask = None
    if visible is not None:
        hidden = torch.arange(len(k)) >= visible.unsqueeze(-1)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    out, lse = out[0].transpose(0, 1), lse[0]
    if visible is not None:
        blind = visible <= 0  # the kernel leaves lse = 0 where every key is masked
        out[blind], lse[:, blind] = 0, float("-inf")
    return out, lse
