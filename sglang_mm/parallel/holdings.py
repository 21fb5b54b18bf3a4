"""The keys that each rank brings to a schedule: cached ones that rest with it, then those of the rows it computes."""

from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sglang_mm.types import BatchLayout, Residence


class Holdings:
    """Of one batch, for all ranks. residence: how the cached prefixes rest, where their keys travel; None where only
    the new rows' keys do. A rank's piece holds, request after request, the resting keys and then the new ones.
    """

    def __init__(self, layout: BatchLayout, residence: Residence | None = None):
        self.layout, self.residence = layout, residence
        self._positions = [[self._of(rank, request) for request in layout.requests] for rank in range(layout.ranks)]

    def _of(self, rank: int, request) -> Tensor:
        return torch.cat([self._resting(rank, request.start), request.rows[rank]])

    def _resting(self, rank: int, start: int) -> Tensor:
        return self.residence.of(rank).positions(0, start) if self.residence else torch.arange(0)

    def positions(self, rank: int, request: int) -> Tensor:
        """int64 CPU, ascending: the positions of the rank's keys of one request."""
        return self._positions[rank][request]

    def rows(self, rank: int) -> int:
        return self.counts[rank]

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each rank's piece."""
        return [sum(map(len, own)) for own in self._positions]

    def segments(self, rank: int) -> list[slice]:
        """One slice of the rank's piece per request; empty where the rank has no key of it."""
        ends = accumulate(map(len, self._positions[rank]), initial=0)
        return [slice(first, last) for first, last in pairwise(ends)]

    def new_rows(self, rank: int) -> Tensor:
        """int64 CPU: where the keys of the rows it computes lie in the rank's piece, in layout order."""
        held = zip(self.segments(rank), self.layout.requests)
        return torch.cat([torch.arange(own.stop - len(request.rows[rank]), own.stop) for own, request in held])
