"""One layer over ranks that are threads: rows and keys by any layout, and the collectives that a selection needs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.transport import Transport
from sglang_mm.patterns.program import Shard
from sglang_mm.types import TokenMap


class ThreadPeers:
    """The patterns' peers over a transport."""

    def __init__(self, transport: Transport):
        self.rank, self.size = transport.rank, transport.size
        self._transport = transport

    def sum(self, tensor: Tensor) -> Tensor:
        return self._transport.sum_(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        parts = self._transport.all_to_all([flat] * self.size, [flat.numel()] * self.size)
        return torch.stack([part.view_as(tensor) for part in parts])


def spread(
    function: Callable,
    q_SHD: Tensor,
    k_SGD: Tensor,
    tokens: TokenMap,
    rows: Sequence[Tensor],
    keys: Sequence[Tensor] = (),
) -> list:
    """function(q, k, rows, keys, peers=...) on each rank; results in order of ranks.

    rows: positions of each rank's rows; keys: of its keys, those of its rows by default.
    """
    keys = keys or rows

    def run(transport: Transport):
        mine, theirs = rows[transport.rank], keys[transport.rank]
        shards = Shard(tokens, mine), Shard(tokens, theirs)
        return function(q_SHD[mine], k_SGD[theirs], *shards, peers=ThreadPeers(transport))

    return run_ranks(run, len(rows))


def random_shards(tokens: int, ranks: int, seed: int = 0, first: int = 0) -> list[Tensor]:
    """Every position from `first` on one of the ranks, in runs of 1 to 200 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 200, (tokens,), generator=draw)
    owner = torch.randint(0, ranks, (tokens,), generator=draw).repeat_interleave(lengths)[:tokens]
    return [(owner[first:] == rank).nonzero().flatten() + first for rank in range(ranks)]
