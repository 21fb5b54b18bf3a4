"""Keys and values at rest, for one sharded batch: where the cached ones are, and where the new ones go.

Tables are made once per batch and serve all layers.
"""

from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.parallel.holdings import Holdings
from sglang_mm.types import BatchLayout, Residence


class Resting:
    """Of one rank. flat[r]: the flat batch's indices of the rows that rank r computes, int64 on the device."""

    def __init__(
        self, forward_batch, layout: BatchLayout, holdings: Holdings, residence: Residence, flat: list[Tensor]
    ):
        self.layout, self.holdings, self.residence, self._flat = layout, holdings, residence, flat
        self._slots, self._rows = forward_batch.out_cache_loc, forward_batch.req_pool_indices

    def cached(self, request: int, req_to_token: Tensor) -> Tensor:
        """int64: rows of this rank's buffers with the request's cached keys that rest here, ascending by position.

        req_to_token: SGLang's table of logical slots, [requests, context].
        """
        if request not in self._cached:
            positions = self.residence.positions(0, self.layout.requests[request].start)
            row = self._rows[request : request + 1]  # a number would make the host wait
            slots = req_to_token[row, positions.to(row.device)]
            self._cached[request] = self.residence.local(slots.long())
        return self._cached[request]

    @cached_property
    def _cached(self) -> dict[int, Tensor]:
        return {}

    def new(self, source: int) -> tuple[Tensor, Tensor]:
        """(int64: which keys of that rank's piece come to rest here, int64: in which rows of this rank's buffers)"""
        return self._new[source]

    @cached_property
    def _new(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for source, flat in enumerate(self._flat):
            positions = torch.cat([own.rows[source] for own in self.layout.requests])
            offset = positions % self.residence.page // self.residence.share
            mine = (offset == self.residence.rank).nonzero().flatten()
            slots = self._slots[flat[mine.to(flat.device)]]
            rows = self.holdings.new_rows(source)[mine]
            found.append((rows.to(flat.device), self.residence.local(slots.long())))
        return found

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """The same for the keys of all ranks, gathered in rank order."""
        firsts = torch.tensor([0, *self.holdings.counts]).cumsum(0).tolist()
        rows, where = zip(*self._new)
        return torch.cat([own + first for own, first in zip(rows, firsts)]), torch.cat(where)
