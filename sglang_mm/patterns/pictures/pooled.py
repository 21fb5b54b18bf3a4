"""A mask of any length as cells of pool x pool pairs, band by band, without an S x S table.

    band of rows  ->  uint8 [rows looked at, K] of Part  ->  per cell the largest part, and the share that is seen

Of a very long prompt some rows of each band are looked at, drawn at random, and all keys.
R rows that are looked at, K keys; h x w cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang_mm.patterns.pictures.parts import Part, UnitParts

MOST_PAIRS = 2**29
"""Looked at for one picture: some seconds on one core, and all pairs of 32K tokens."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """rows: those that one prefill computed, with the sets of its own selection."""

    rows: range
    parts: UnitParts


@dataclass(frozen=True, eq=False)
class Cells:
    """part: uint8 [h, w], the largest Part. share: fp32 [h, w], seen pairs over causal ones; NaN where none is causal,
    or no row was computed. counts: int64 [Part], pairs of each part that were looked at; causal: all causal ones.
    looked_at: rows of each band of `pool` rows.
    """

    part: np.ndarray
    share: np.ndarray
    counts: np.ndarray
    causal: int
    pool: int
    looked_at: int


def pool_pairs(chunks: Sequence[Chunk], rows: range, keys: range, pool: int, most: int = MOST_PAIRS) -> Cells:
    """The cells of a window of the prompt. most: pairs to look at, at least one row of each band."""
    height, width = -(-len(rows) // pool), -(-len(keys) // pool)
    part, share = np.zeros((height, width), dtype=np.uint8), np.full((height, width), np.nan, dtype=np.float32)
    pairs = _causal(torch.arange(rows.start, rows.stop), keys)
    looked_at = pool if pairs <= most else max(1, pool * most // pairs)
    counts, causal = np.zeros(len(Part), dtype=np.int64), 0
    draw = torch.Generator().manual_seed(0)
    for band in range(height):
        first = rows.start + band * pool
        row_R = torch.arange(first, min(first + pool, rows.stop))
        row_R = row_R[torch.randperm(len(row_R), generator=draw)[:looked_at]].sort().values
        seen_w, causal_w = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        for chunk in chunks:
            own_R = row_R[(row_R >= chunk.rows.start) & (row_R < chunk.rows.stop)]
            stop = min(keys.stop, int(own_R[-1]) + 1) if len(own_R) else 0
            if stop <= keys.start:
                continue
            part_RK = chunk.parts.of(own_R, torch.arange(keys.start, stop)).numpy()
            counts += [np.count_nonzero(part_RK == each) for each in Part]
            part[band] = np.maximum(part[band], _by_cell(part_RK.max(0), pool, width).max(1))
            seen_w += _by_cell((part_RK != Part.UNSEEN).sum(0, dtype=np.int32), pool, width).sum(1)
            causal_w += _causal_by_cell(own_R, keys, pool, width).numpy()
        causal += int(causal_w.sum())
        share[band] = np.where(causal_w > 0, seen_w / np.maximum(causal_w, 1), np.nan)
    return Cells(part, share, counts, causal, pool, looked_at)


def _by_cell(value_K: np.ndarray, pool: int, width: int) -> np.ndarray:
    """[w, pool], with zeros at the end."""
    return np.pad(value_K, (0, width * pool - len(value_K))).reshape(width, pool)


def _causal(row_R: Tensor, keys: range) -> int:
    """Pairs of these rows and keys that are causal."""
    return int((row_R + 1 - keys.start).clamp(0, len(keys)).sum())


def _causal_by_cell(row_R: Tensor, keys: range, pool: int, width: int) -> Tensor:
    """int64 [w]."""
    start_w = keys.start + torch.arange(width) * pool
    size_w = (keys.stop - start_w).clamp(max=pool)
    return torch.minimum((row_R[:, None] + 1 - start_w).clamp(min=0), size_w).sum(0)
