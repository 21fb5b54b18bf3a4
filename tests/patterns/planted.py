"""Queries and keys whose attention is known by construction, with noise on top.

K/V heads all hold the same features of a key, and a query head picks what it attends to, `logit` above the rest:

    key features     one-hot frame class | one-hot column class | one-hot block of 128 | is a marked column | noise
    query of Line    logit at one class                                                                      | noise
    query of Shift   logit at (its class - shift) mod classes, for rows that are places of a frame
    query of Diagonal                               logit at (its block - diagonal)
    query of Columns                                                              logit
    query of Noise   nothing

Noise adds a normal deviate of standard deviation `noise` to every logit, another one for each head, row and key.
Suffixes: S tokens, H heads, F features, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.types import Axis, TokenMap

NOISE_DIMS = 64
SCALE = 1.0


@dataclass(frozen=True)
class Line:
    axis: Axis
    klass: int


@dataclass(frozen=True)
class Shift:
    axis: Axis
    shift: int


@dataclass(frozen=True)
class Diagonal:
    diagonal: int


@dataclass(frozen=True)
class Columns:
    pass


@dataclass(frozen=True)
class Noise:
    pass


Plant = Line | Shift | Diagonal | Columns | Noise


def plant(
    tokens: TokenMap, plants: list[Plant], *, group: int = 1, logit: float = 10.0, noise: float = 0.0,
    columns: tuple[int, ...] = (), seed: int = 0, dtype=torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q [S, H, D], k [S, H / group, D]) for one plant per query head; scores are q @ k, unscaled."""
    draw = torch.Generator().manual_seed(seed)
    marked = torch.zeros(len(tokens), 1, dtype=torch.float64)
    marked[list(columns)] = 1
    key_SF = torch.cat([*_features(tokens).values(), marked], dim=1)
    heads = len(plants)
    k_SHF = key_SF[:, None].expand(-1, heads // group, -1)
    q_SHF = logit * torch.stack([_query(tokens, each) for each in plants], dim=1)
    spread = (noise / NOISE_DIMS**0.5) ** 0.5
    q_noise, k_noise = (
        spread * torch.randn(len(tokens), count, NOISE_DIMS, generator=draw, dtype=torch.float64)
        for count in (heads, heads // group)
    )
    return torch.cat([q_SHF, q_noise], dim=2).to(dtype), torch.cat([k_SHF, k_noise], dim=2).to(dtype)


def _features(tokens: TokenMap) -> dict:
    block_S = torch.arange(len(tokens)) // BLOCK
    made = {axis: _one_hot(tokens.classes(axis).of_token.long(), len(tokens.classes(axis))) for axis in Axis}
    return made | {"block": _one_hot(block_S, int(block_S[-1]) + 1)}


def _one_hot(number_S: Tensor, count: int) -> Tensor:
    """fp64 [S, count]; zeros for -1."""
    return one_hot(number_S + 1, count + 1)[:, 1:].double()


def _query(tokens: TokenMap, wanted: Plant) -> Tensor:
    """fp64 [S, F]."""
    features = {name: torch.zeros_like(each) for name, each in _features(tokens).items()}
    marked = torch.zeros(len(tokens), 1, dtype=torch.float64)
    match wanted:
        case Line(axis, klass):
            features[axis][:, klass] = 1
        case Shift(axis, shift):
            classes = tokens.classes(axis)
            class_S = classes.of_token.long()
            starts = torch.tensor(classes.starts)
            space_S = classes.spaces[class_S.clamp(min=0)]
            start_S, size_S = starts[space_S], starts.diff()[space_S]
            target_S = (class_S - start_S - shift) % size_S + start_S
            features[axis] = _one_hot(torch.where(class_S >= 0, target_S, -1), len(classes))
        case Diagonal(diagonal):
            block_S = torch.arange(len(tokens)) // BLOCK - diagonal
            features["block"] = _one_hot(block_S.clamp(min=-1), features["block"].shape[1])
        case Columns():
            marked[:] = 1
    return torch.cat([*features.values(), marked], dim=1)
