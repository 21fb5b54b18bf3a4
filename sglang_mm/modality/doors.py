"""The two doors into the TokenMap, for what SGLang has at prefill and for what a transformers processor returns.

SGLang keeps the positions of media (`offsets`, inclusive) and has written hashes over their ids. A processor returns
ids with placeholders. The second door finds the offsets of the placeholders and goes through the first.

    ids       t  t  v  P  P  P  e  t  v  P  P  P  e  t  v  I  I  I  I  e      v, e: vision start and end
    bundles   offsets (3, 5) (9, 11): one video of grid (2, 1, 3)    offsets (15, 18): one image of grid (1, 2, 2)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.modality.family import Family, Medium, Part
from sglang_mm.modality.token_map import NO_WRAPS, Item, Wraps, build_token_map
from sglang_mm.types import Modality, TokenMap


@dataclass(frozen=True)
class Bundle:
    """Media whose tokens are, one after another, those at `offsets`: (first, last) positions, inclusive, ascending.

    An item of SGLang is a bundle: one image, one video in one stretch or in a stretch per frame, or several of these.
    Stretches need not end where media do, if all grids are known. Otherwise each medium is a stretch, or it is the only
    one.
    """

    offsets: Sequence[tuple[int, int]]
    media: Sequence[Medium]


def map_from_offsets(family: Family, ids: Tensor, bundles: Sequence[Bundle], wraps: Wraps = NO_WRAPS) -> TokenMap:
    """The TokenMap of a prompt from positions of its media, in any order.

    ids int64 [S], on the CPU: the prompt; ids of media do not matter. wraps: ids of vision start and end.
    Raises ConfigError for grids that do not fit the offsets, and for media that overlap or lie beyond the prompt.
    """
    _check_ids(ids)
    items = [item for bundle in bundles for item in _items_of(family, bundle)]
    items.sort(key=lambda item: item.first)
    return build_token_map(ids, items, wraps)


def map_from_ids(
    family: Family,
    ids: Tensor,
    media: Sequence[Medium],
    placeholders: Mapping[Modality, int],
    wraps: Wraps = NO_WRAPS,
) -> TokenMap:
    """The TokenMap of a prompt from ids in which the tokens of media are placeholders.

    media: in prompt order; images and videos may be listed apart unless they share a placeholder id.
    placeholders: id of an image token, of a video token. Raises ConfigError as map_from_offsets does.
    """
    _check_ids(ids)
    bundles = []
    for token in dict.fromkeys(placeholders.values()):
        own = [medium for medium in media if placeholders.get(medium.modality) == token]
        offsets = _runs_of_token(ids, token)
        if own or len(offsets):
            bundles.append(Bundle(offsets, own))
    missing = [str(medium) for medium in media if medium.modality not in placeholders]
    if missing:
        raise ConfigError(f"{missing[0]} without a placeholder id", "an id per modality", "add it to the placeholders")
    return map_from_offsets(family, ids, bundles, wraps)


def _check_ids(ids: Tensor) -> None:
    if ids.dim() != 1 or not len(ids):
        raise ConfigError(f"ids of shape {tuple(ids.shape)}", "[tokens], one or more", "pass one prompt at a time")


def _runs_of_token(ids: Tensor, token: int) -> Sequence[tuple[int, int]]:
    """(first, last) of every stretch of `token`."""
    is_token = torch.nn.functional.pad((ids == token).to(torch.int8), (1, 1))
    change = is_token.diff()
    return torch.stack([(change == 1).nonzero()[:, 0], (change == -1).nonzero()[:, 0] - 1], dim=1).numpy()


def _items_of(family: Family, bundle: Bundle) -> list[Item]:
    runs = np.asarray(bundle.offsets, dtype=np.int64).reshape(-1, 2)
    ascending = (runs[:, 1] >= runs[:, 0]).all() and (runs[1:, 0] > runs[:-1, 1]).all()
    if not len(runs) or not bundle.media or not ascending or runs[0, 0] < 0:
        given = f"{len(bundle.media)} media at {len(runs)} offsets, {[tuple(run) for run in runs[:3].tolist()]} first"
        allowed = "(first, last) pairs, ascending from 0 on, and media for them"
        raise ConfigError(given, allowed, "check offsets and grids")
    if len(bundle.media) == 1:
        return _placed(family, bundle.media[0], runs)
    lengths = [-1]
    if all(medium.grid is not None for medium in bundle.media):
        lengths = [sum(part.tokens for part in family.parts(medium, None)) for medium in bundle.media]
    tokens = int((runs[:, 1] - runs[:, 0] + 1).sum())
    if sum(lengths) == tokens:
        pieces = _cut(runs, lengths)
    elif len(bundle.media) == len(runs):
        pieces = np.split(runs, len(runs))
    else:
        known = f"that have {sum(lengths)}" if sum(lengths) > 0 else "some of unknown grid"
        given = f"{tokens} tokens in {len(runs)} stretches for {len(bundle.media)} media, {known}"
        raise ConfigError(given, "a stretch each, or as many tokens as the grids say", "check offsets and grids")
    return [item for medium, piece in zip(bundle.media, pieces) for item in _placed(family, medium, piece)]


def _cut(runs: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """The runs of each medium, given how many tokens each has, all together as many as the runs; a run may be cut."""
    before = np.concatenate([[0], (runs[:, 1] - runs[:, 0] + 1).cumsum()])
    bounds, pieces = [0, *accumulate(lengths)], []
    for low, high in pairwise(bounds):
        here = slice(np.searchsorted(before, low, "right") - 1, np.searchsorted(before, high, "left"))
        piece, start = runs[here].copy(), before[here]
        piece[0, 0] += low - start[0]
        piece[-1, 1] = runs[here][-1, 0] + high - 1 - start[-1]
        pieces.append(piece)
    return pieces


def _placed(family: Family, medium: Medium, runs: np.ndarray) -> list[Item]:
    """The items of a medium whose tokens are those of the runs."""
    lengths = runs[:, 1] - runs[:, 0] + 1
    parts = family.parts(medium, lengths.tolist())
    expected = sum(part.tokens for part in parts)
    if expected != lengths.sum():
        given = f"{lengths.sum()} tokens for {medium}, which has {expected} for {family.name}"
        raise ConfigError(given, "as many tokens as the grid says", "check the grid that the processor reported")
    items, taken = [], 0
    for part in parts:
        starts = _frame_starts(medium, part, taken, runs, lengths)
        items.append(Item(medium.modality, part.grid, torch.from_numpy(starts), part.places, part.closing))
        taken += part.tokens
    return items


def _frame_starts(medium: Medium, part: Part, taken: int, runs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [frames]: position of each frame, `taken` tokens of the medium having gone before."""
    first = taken + np.arange(part.frames) * part.frame_tokens
    size = np.full(part.frames, part.frame_tokens)
    size[-1] += len(part.closing)
    if len(runs) == 1:
        return runs[0, 0] + first
    before = lengths.cumsum() - lengths
    run = np.searchsorted(before, first, "right") - 1
    inside = first - before[run]
    if (inside + size > lengths[run]).any():
        given = f"{medium} in stretches of {sorted(set(lengths.tolist()))[:3]} tokens"
        raise ConfigError(given, f"whole frames of {part.frame_tokens} tokens", "check the offsets")
    return runs[run, 0] + inside
