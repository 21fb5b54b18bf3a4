"""Gathered attention: keys and values of head h + 1 arrive from all other ranks while head h is computed.

    stage        0           1           2           3
    under way    head 0, 1   head 1, 2   head 2, 3   head 3          4 K/V heads; a head travels in one message
    computed     head 0      head 1      head 2      head 3          from each rank to each other one

On several nodes a share crosses to each other node once: to the counterpart there (nodes.py), which passes it on.

    stage        0           1           2           3
    across       head 0..2   head 2, 3   head 3                      own share, to the counterparts
    inside       head 0, 1   head 1, 2   head 2, 3   head 3          own and counterparts' shares, to the same node
    computed     head 0      head 1      head 2      head 3

A row meets all its keys at once, in order of position: no partial results, no merges, and no rank that waits for its
neighbour's kernel. T rows of this rank, N keys of all ranks, H heads, n heads of one stage, D head dim.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import merge
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.nodes import Nodes
from sglang_mm.parallel.pieces import Attend, Prefix, State, cached_rows, causal, expect_rows
from sglang_mm.parallel.stopwatch import Watch, unwatched
from sglang_mm.parallel.transport import Settle, Transport
from sglang_mm.types import BatchLayout

MOST_STAGES = 8  # beyond that a stage takes several heads: messages and kernel calls cost more than they hide


Keep = Callable[[slice, Tensor], None]
"""(K/V heads of a stage, their gathered keys and values [N, 2, n, D]): to put away what should rest here."""


class GatherTables:
    """Where gathered keys lie, and their order. One per batch: it serves all layers and heads.

    Gathered rows: those that rank 0 brings, then rank 1, and so on; sources[r] are those of rank r. order[i]: int64 on
    the device, the gathered rows of request i by position, from position first[i] on. positions[i]: int64 CPU, all of
    request i's, from 0 on.
    """

    def __init__(self, layout: BatchLayout, device: torch.device | str, holdings: Holdings | None = None):
        self.layout, self.holdings = layout, holdings or Holdings(layout)
        self.sources = [slice(*pair) for pair in pairwise(accumulate(self.holdings.counts, initial=0))]
        self.first = [0 if self.holdings.residence else own.start for own in layout.requests]
        self.order = [self._order(request).to(device) for request in range(len(layout.requests))]
        self.positions = [torch.arange(own.start + own.length) for own in layout.requests]

    def _order(self, request: int) -> Tensor:
        own, first = self.layout.requests[request], self.first[request]
        order = torch.empty(own.start + own.length - first, dtype=torch.int64)
        for rank, source in enumerate(self.sources):
            held = self.holdings.segments(rank)[request]
            gathered = torch.arange(source.start + held.start, source.start + held.stop)
            order[self.holdings.positions(rank, request) - first] = gathered
        return order

    @property
    def rows(self) -> int:
        """N, the keys of the batch that travel."""
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
    state: State | None = None,
    keep: Keep | None = None,
    backend: str = "auto",
    attend: Attend | None = None,
    watch: Watch = unwatched,
) -> Tensor:
    """Attention of this rank's rows over their prompts' cached keys and all ranks' keys: out [T, Hq, D].

    q [T, Hq, D]: the rank's rows of all requests, in layout order; T may be 0. k, v [.., Hkv, D]: what the rank brings,
    in the order of the tables' holdings. Collective: every rank of the layout calls it. Cached keys are in `prefix`, on
    this rank, or in the holdings, or their part of the result is in `state`, which is written to. keep: called once
    per stage; no more than two stages are held at once, and on several nodes the counterparts' shares of a third.
    attend: how rows meet keys, by default `causal`. watch: stages `attention` (copies of keys included) and
    `transport`. Raises ConfigError when q, k, v, a prefix or the ring do not fit the layout, RingBroken past the
    deadline.
    """
    _validate(q, k, v, tables, transport)
    attend = attend or causal(scale, backend)
    requests, group = tables.layout.requests, q.shape[1] // k.shape[1]
    here = state is None and tables.holdings.residence is None
    cached = [cached_rows(prefix, i, own.start, k) if here else (k[:0], v[:0]) for i, own in enumerate(requests)]
    mine = tables.layout.segments(transport.rank)
    out = q.new_empty(q.shape) if state is None else state[0]
    for heads, kv in _stages(k, v, tables, transport, watch):
        q_heads = slice(heads.start * group, heads.stop * group)
        with watch("attention"):
            for request, (own, rows) in enumerate(zip(requests, mine)):
                queries = own.rows[transport.rank]
                if len(queries):
                    stop = int(queries[-1]) + 1  # no row looks beyond
                    order = tables.order[request][: stop - tables.first[request]]
                    keys = _by_position(kv, order, cached[request], heads)
                    positions = tables.positions[request][stop - len(keys[0]) : stop]
                    partial = attend(request, None, heads, q[rows, q_heads], *keys, queries, positions)
                    if state is None:
                        out[rows, q_heads] = partial[0]
                    else:
                        merge(out[rows, q_heads], state[1][q_heads, rows], *partial)
        if keep:
            with watch("attention"):
                keep(heads, kv)
    return out.to(q.dtype)


def _stages(
    k: Tensor, v: Tensor, tables: GatherTables, transport: Transport, watch: Watch
) -> Iterator[tuple[slice, Tensor]]:
    """Per stage its heads and their gathered keys and values [N, 2, n, D]; the next stage is under way meanwhile."""
    ways = _Ways(k, v, tables, transport, watch)
    following = ways.post(0)
    for stage, heads in enumerate(ways.stages):
        kv, settle = following
        if stage + 1 < len(ways.stages):
            following = ways.post(stage + 1)
        with watch("transport"):
            settle(False)
        yield heads, kv


class _Ways:
    """How stages travel: across nodes, if there are several, a stage ahead, and then inside the node."""

    def __init__(self, k: Tensor, v: Tensor, tables: GatherTables, transport: Transport, watch: Watch):
        self.k, self.v, self.stages = k, v, head_stages(k.shape[1])
        self.tables, self.transport, self.watch = tables, transport, watch
        nodes = transport.topology
        if not nodes.two_links:
            nodes = Nodes(nodes.ranks)  # all others are as far
        self.abroad = nodes.counterparts(transport.rank)
        self.passed_on = {other: [other, *nodes.counterparts(other)] for other in nodes.neighbours(transport.rank)}
        self._crossing: tuple[dict[int, Tensor], Settle] | None = None
        self._cross(0)

    def post(self, stage: int) -> tuple[Tensor, Settle]:
        """Send on what this rank has of a stage. (keys and values [N, 2, n, D], what waits for the others' of them)"""
        heads, sources = self.stages[stage], self.tables.sources
        kv = self.k.new_empty(self.tables.rows, 2, heads.stop - heads.start, self.k.shape[2])
        own = kv[sources[self.transport.rank]]
        own[:, 0], own[:, 1] = self.k[:, heads], self.v[:, heads]
        self._fill_in(kv)
        mine = [own, *(kv[sources[other]] for other in self.abroad)]
        send = dict.fromkeys(self.passed_on, mine)
        receive = {other: [kv[sources[each]] for each in theirs] for other, theirs in self.passed_on.items()}
        settle = self.transport.exchange(send, receive, self._name(stage), "kv")
        self._cross(stage + 1)
        return kv, settle

    def _cross(self, stage: int) -> None:
        """Post a stage's way to the counterparts and from them."""
        if not self.abroad or stage == len(self.stages):
            return
        own = torch.stack([side[:, self.stages[stage]] for side in (self.k, self.v)], dim=1)
        rows = self.tables.holdings.rows
        shares = {other: own.new_empty(rows(other), *own.shape[1:]) for other in self.abroad}
        send, receive = {other: [own] for other in shares}, {other: [share] for other, share in shares.items()}
        settle = self.transport.exchange(send, receive, f"{self._name(stage)}, across nodes", "kv")
        self._crossing = shares, settle

    def _fill_in(self, kv: Tensor) -> None:
        """Into their places what came from the counterparts; then it is let go."""
        if self._crossing:
            (shares, settle), self._crossing = self._crossing, None
            with self.watch("transport"):
                settle(False)
            for other, share in shares.items():
                kv[self.tables.sources[other]] = share

    def _name(self, stage: int) -> str:
        return f"gather stage {stage + 1} of {len(self.stages)}"


def _by_position(kv: Tensor, order: Tensor, cached: tuple[Tensor, Tensor], heads: slice) -> tuple[Tensor, Tensor]:
    """k, v [len(cached) + len(order), n, D] of one request, cached ones first."""
    k, v = kv.index_select(0, order).unbind(1)
    if not len(cached[0]):
        return k, v
    return torch.cat([cached[0][:, heads], k]), torch.cat([cached[1][:, heads], v])


def _validate(q: Tensor, k: Tensor, v: Tensor, tables: GatherTables, transport: Transport) -> None:
    layout, rank = tables.layout, transport.rank
    if transport.size != layout.ranks:
        raise ConfigError(f"a ring of {transport.size} ranks", f"the layout's {layout.ranks}", "lay out for this ring")
    expect_rows("q", q, layout.rows(rank))
    for name, tensor in (("k", k), ("v", v)):
        expect_rows(name, tensor, tables.holdings.rows(rank))
    if k.shape != v.shape or q.shape[2] != k.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ConfigError(shapes, "q [T,Hq,D], k and v [T,Hkv,D], Hq a multiple of Hkv", "check the head split")
