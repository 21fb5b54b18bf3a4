"""Gathered attention: keys and values of head h + 1 arrive from all other ranks while head h is computed.

    stage        0           1           2           3
    under way    head 0, 1   head 1, 2   head 2, 3   head 3          4 K/V heads; a head travels in one message
    computed     head 0      head 1      head 2      head 3          from each rank to each other one

A row meets all its keys at once, in order of position: no partial results, no merges, and no rank that waits for its
neighbour's kernel. T rows of this rank, N of all ranks, H heads, n heads of one stage, D head dim.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import causal_attention
from sglang_mm.parallel.pieces import Piece, Prefix, cached_rows, expect_rows
from sglang_mm.parallel.stopwatch import Watch, unwatched
from sglang_mm.parallel.transport import Settle, Transport
from sglang_mm.types import BatchLayout

MOST_STAGES = 8  # beyond that a stage takes several heads: messages and kernel calls cost more than they hide


class GatherTables:
    """Where gathered keys lie, and their order. One per layout: it serves all layers and heads.

    Gathered rows: those of rank 0, of rank 1, and so on; sources[r] are those of rank r. order[i]: int64 [length] on
    the device, the gathered rows of request i by position. positions[i]: int64 CPU, 0 .. start + length - 1.
    """

    def __init__(self, layout: BatchLayout, device: torch.device | str):
        self.layout = layout
        ends = accumulate((layout.rows(rank) for rank in range(layout.ranks)), initial=0)
        self.sources = [slice(first, last) for first, last in pairwise(ends)]
        first_rows = torch.tensor(
            [[own.start + held.start for held in layout.segments(rank)] for rank, own in enumerate(self.sources)]
        )
        self.order = [
            (first_rows[own.owner(), request] + own.slot()).to(device) for request, own in enumerate(layout.requests)
        ]
        self.positions = [torch.arange(own.start + own.length) for own in layout.requests]

    @property
    def rows(self) -> int:
        """N, the new rows of the batch."""
        return self.sources[-1].stop


def head_stages(kv_heads: int) -> list[slice]:
    """The K/V heads of each stage."""
    heads = -(-kv_heads // MOST_STAGES)
    return [slice(first, min(first + heads, kv_heads)) for first in range(0, kv_heads, heads)]


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: GatherTables,
    transport: Transport,
    *,
    scale: float,
    prefix: Prefix | None = None,
    keep: Callable[[Piece], None] | None = None,
    backend: str = "auto",
    watch: Watch = unwatched,
) -> Tensor:
    """Dense causal attention of this rank's rows over the cached prefixes and all ranks' rows: out [T, Hq, D], as q.

    q [T, Hq, D], k, v [T, Hkv, D]: the rank's rows of all requests, in layout order; T may be 0. Collective: every
    rank of the layout calls it. keep: called once per rank in rank order, the own one included, with contiguous k, v
    [its T, Hkv, D]; without it no more than two stages are held at once. watch: stages `attention` (copies of keys
    included) and `transport`. Raises ConfigError when q, k, v, a prefix or the ring do not fit the layout,
    RingBroken past the deadline.
    """
    _validate(q, k, v, tables, transport)
    requests, group = tables.layout.requests, q.shape[1] // k.shape[1]
    cached = [cached_rows(prefix, request, own.start, k) for request, own in enumerate(requests)]
    mine = tables.layout.segments(transport.rank)
    out, gathered = q.new_empty(q.shape), []
    for heads, kv in _stages(k, v, tables, transport, watch):
        q_heads = slice(heads.start * group, heads.stop * group)
        with watch("attention"):
            for request, (own, rows) in enumerate(zip(requests, mine)):
                queries = own.rows[transport.rank]
                if len(queries):
                    stop = int(queries[-1]) + 1  # no row looks beyond
                    keys = _by_position(kv, tables.order[request][: stop - own.start], cached[request], heads)
                    positions = tables.positions[request][:stop]
                    given = q[rows, q_heads], *keys, queries, positions
                    out[rows, q_heads], _ = causal_attention(*given, scale=scale, backend=backend)
        if keep:
            gathered.append(kv)
    if keep:
        for source, rows in enumerate(tables.sources):
            with watch("attention"):
                keys, values = (torch.cat([kv[rows, side] for kv in gathered], dim=1) for side in range(2))
            keep(Piece(source, keys, values))
    return out


def _stages(
    k: Tensor, v: Tensor, tables: GatherTables, transport: Transport, watch: Watch
) -> Iterator[tuple[slice, Tensor]]:
    """Per stage its heads and their gathered keys and values [N, 2, n, D]; the next stage is under way meanwhile."""
    stages = head_stages(k.shape[1])
    following = _post(k, v, stages, 0, tables, transport)
    for stage, heads in enumerate(stages):
        kv, settle = following
        if stage + 1 < len(stages):
            following = _post(k, v, stages, stage + 1, tables, transport)
        with watch("transport"):
            settle(False)
        yield heads, kv


def _post(
    k: Tensor, v: Tensor, stages: list[slice], stage: int, tables: GatherTables, transport: Transport
) -> tuple[Tensor, Settle]:
    heads, rank = stages[stage], transport.rank
    kv = k.new_empty(tables.rows, 2, heads.stop - heads.start, k.shape[2])
    own = kv[tables.sources[rank]]
    own[:, 0], own[:, 1] = k[:, heads], v[:, heads]
    peers = [peer for peer in range(transport.size) if peer != rank]
    send = {peer: [own] for peer in peers}
    receive = {peer: [kv[tables.sources[peer]]] for peer in peers}
    return kv, transport.exchange(send, receive, f"gather stage {stage + 1} of {len(stages)}", "kv")


def _by_position(kv: Tensor, order: Tensor, cached: tuple[Tensor, Tensor], heads: slice) -> tuple[Tensor, Tensor]:
    """k, v [start + len(order), n, D] of one request, prefix first."""
    k, v = kv.index_select(0, order).unbind(1)
    if not len(cached[0]):
        return k, v
    return torch.cat([cached[0][:, heads], k]), torch.cat([cached[1][:, heads], v])


def _validate(q: Tensor, k: Tensor, v: Tensor, tables: GatherTables, transport: Transport) -> None:
    layout = tables.layout
    if transport.size != layout.ranks:
        raise ConfigError(f"a ring of {transport.size} ranks", f"the layout's {layout.ranks}", "lay out for this ring")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_rows(name, tensor, layout.rows(transport.rank))
    if k.shape != v.shape or q.shape[2] != k.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ConfigError(shapes, "q [T,Hq,D], k and v [T,Hkv,D], Hq a multiple of Hkv", "check the head split")
