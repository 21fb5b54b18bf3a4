"""With which tile sizes, warps and loads the attention kernel is compiled: a small table, nothing is tried out.

Each row was chosen by what the compiler makes of it: no spills, shared memory and registers that fit, and for 16-bit
numbers three stages of K and V in flight. Which of several such is the fastest is still to be measured.
"""

from dataclasses import dataclass

import torch
from triton import next_power_of_2

TILE = 128
"""Rows of a program's tile, at most."""
LARGEST_HEAD = 128
LARGEST_GROUP = 16
"""Query heads of a K/V head where one query row meets a pool: what a product of 16 rows holds."""
JOIN_ROWS, JOIN_WARPS = 16, 4
"""Rows of a step where parts of a split item are joined."""


@dataclass(frozen=True)
class Config:
    """rows, keys: of a step; tma: K and V by descriptors."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool


def choose_config(capability: int, dtype: torch.dtype, head_dim: int) -> Config:
    """capability: 90 for sm_90; 0 for the interpreter, which runs what sm_90 does."""
    if dtype == torch.float32:  # products in IEEE fp32, without tensor cores: larger steps spill
        return Config(16, 16 if capability // 10 == 12 else 32, 8, 1, tma=False)
    if capability == 0 or capability // 10 in (9, 10):
        keys = 32 if capability >= 100 and head_dim > 64 else 64
        return Config(128, keys, 8, 3, tma=True)
    if capability == 80:
        return Config(128, 64, 8, 3, tma=False)
    return Config(64, 64 if head_dim <= 64 else 32, 4, 3, tma=False)  # 99 KiB of shared memory


def choose_paged_config(capability: int, dtype: torch.dtype, is_single: bool) -> Config:
    """For keys in a pool. is_single: one query row per request, whose heads are the rows; memory bounds its speed.

    capability: as for `choose_config`. By pointers alone: pages are short, and shares of them no powers of two. Page
    ids are loaded before keys and values, which takes half of the stages: of 5, two steps of keys are under way.
    """
    if dtype == torch.float32:
        return Config(16, 32 if is_single else 16, 4, 1, tma=False)
    is_large = capability in (0, 80) or capability // 10 in (9, 10)  # shared memory for more than one large step
    if is_single:
        return Config(16, 64 if is_large else 32, 4, 5, tma=False)
    return Config(128, 64, 8, 5, tma=False) if is_large else Config(64, 32, 4, 5, tma=False)


def padded(head_dim: int) -> int:
    """Head dim as the kernel holds it: tl.arange and tl.dot need powers of two, from 16 on."""
    return max(16, next_power_of_2(head_dim))
