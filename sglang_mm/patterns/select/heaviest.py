"""The heaviest of many masses, chosen alike on every rank: masses count to 20 significant bits, ties take the lower.

N choices to make, X things to choose among.
"""

import torch
from torch import Tensor

from sglang_mm.types import INF

POSITION_BITS = 31


def rank_key(mass: Tensor, number: Tensor) -> Tensor:
    """int64, all different, larger for what is to be taken first; -1 where the mass is not positive.

    mass: any numbers; number: what ties are decided by, 0 <= number < 2^31, and can be read from the key.
    """
    to_20_bits = (mass.float().view(torch.int32) + 8) >> 4  # of an fp32's 24 significant bits
    return torch.where(mass > 0, (to_20_bits.long() << POSITION_BITS) | (INF - number), -1)


def number_of(key: Tensor) -> Tensor:
    """The number in a rank key that is not -1."""
    return INF - (key & INF)


def heaviest(mass_NX: Tensor, most_N: Tensor, spaces_X: Tensor) -> Tensor:
    """bool [N, X]: of each name space the most_N[n] heaviest, fewer where fewer have any mass.

    spaces_X: int64, ascending.
    """
    order_NX = rank_key(mass_NX, torch.arange(mass_NX.shape[1], device=mass_NX.device)).argsort(descending=True)
    by_space_NX = spaces_X[order_NX].argsort(stable=True)
    order_NX = order_NX.gather(1, by_space_NX)
    place_X = torch.arange(len(spaces_X), device=spaces_X.device) - torch.searchsorted(spaces_X, spaces_X)
    taken_NX = torch.zeros_like(mass_NX, dtype=torch.bool)
    return taken_NX.scatter_(1, order_NX, place_X < most_N[:, None]) & (mass_NX > 0)


def split_rows(is_taken_NX: Tensor) -> list[Tensor]:
    """Per row the places that are true: int64, ascending."""
    return list(is_taken_NX.nonzero()[:, 1].split(is_taken_NX.sum(1).tolist()))
