"""Which rank keeps a token's keys and values: another question than which rank computes them.

Pages of `page` tokens, the same page ids on every rank; rank r of C keeps rows [r*share, (r+1)*share) of each page,
share = page / C. A request's pages begin at multiples of `page`, so position and slot lie alike in their page.

    page of 64, C = 4      0 .. 15   16 .. 31   32 .. 47   48 .. 63     offset in the page
    kept by rank           0         1          2          3
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError

SMALLEST_PAGE = 64  # tokens: short enough for prefix hits, long enough for kernels that read it in one go


def page_for(ranks: int) -> int:
    """The smallest page of at least SMALLEST_PAGE tokens that `ranks` ranks can share evenly."""
    return -(-SMALLEST_PAGE // ranks) * ranks


@dataclass(frozen=True)
class Residence:
    """Of one rank. ranks: how many share a page; 1, and one rank keeps all. Raises ConfigError where they cannot."""

    ranks: int
    rank: int
    page: int

    def __post_init__(self):
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank {self.rank} of {self.ranks}", "0 <= rank < ranks", "pass a rank of the ring")
        if self.page < 1 or self.page % self.ranks:
            given, remedy = f"pages of {self.page} tokens for {self.ranks} ranks", f"pass {page_for(self.ranks)}"
            raise ConfigError(given, f"a multiple of {self.ranks}", remedy)

    @property
    def share(self) -> int:
        """Tokens of each page that a rank keeps."""
        return self.page // self.ranks

    def of(self, rank: int) -> "Residence":
        """The same pages, seen from another rank."""
        return Residence(self.ranks, rank, self.page)

    def held(self, length: int | Tensor) -> int | Tensor:
        """How many of positions 0 .. length - 1 this rank keeps. A tensor of lengths gives a tensor, without a sync."""
        over = length % self.page - self.rank * self.share
        over = over.clamp(0, self.share) if isinstance(over, Tensor) else min(max(over, 0), self.share)
        return length // self.page * self.share + over

    def positions(self, start: int, stop: int) -> Tensor:
        """int64 CPU, ascending: the positions in [start, stop) that this rank keeps."""
        kept = torch.arange(self.held(start), self.held(stop))
        return kept // self.share * self.page + self.rank * self.share + kept % self.share

    def local(self, slots: Tensor) -> Tensor:
        """Where this rank keeps each logical slot (any integer dtype and device); 0, in the padding page, where another
        rank does.
        """
        mine = slots % self.page // self.share == self.rank
        return torch.where(mine, slots // self.page * self.share + slots % self.share, 0)
