"""What attention of one prefill will cost under each schedule: the slowest rank's seconds, K/V transport included.

C ranks, R rows of a rank, N rows of all, P (query, key) pairs, D head dim, b bytes of an element. Per layer:

    attend(P)     calls * call_s + 4 * D * Hq * P / attention_flops_per_s           two products, 2 operations each
    send(bytes)   messages * latency_s + bytes / bytes_per_s
    merge(R)      3 * R * Hq * D * (4, in fp64 8) / memory_bytes_per_s              state read, partial read, written
    copy(R, n)    2 * R * 2 * n * D * b / memory_bytes_per_s                        keys and values of n heads

    ring      prefix, then C hops in lock step: the slowest rank's attend + merge of a piece, or, where that is longer,
              the send of the largest next piece. The last hop sends nothing.
    gather    per rank: the first stage's send, then per stage attend + copy of the keys it sees, into their order, or,
              where that is longer, the next stage's send.

On several nodes a message has the latency and rate of the link that it takes (nodes.py, gather.py):

    ring      rounds of hops inside the nodes, as above; a round takes at least the send of the largest piece across
    gather    a stage's send has two parts, across and then inside. The first stage waits for both, and for the
              second stage's way across; then a stage hides the next one's way inside and the one's after it across.

Cached keys are on every rank (`prefix`), or they travel with the new ones, or their part is done before, by `pass_q`:
then it is the same for both and left out.

So the total is transport of the first stage + sum of max(compute of a stage, transport of the next); layers are alike.
Left out, since it is the same for both: masked keys that a kernel computes all the same (a short prompt takes longer
than predicted), the write to the pool, and what is not attention. Why these schedules: docs/decisions.md.
"""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.merge import state_dtype
from sglang_mm.parallel.gather import head_stages
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.nodes import Nodes, ring_hops
from sglang_mm.types import BatchLayout, Layout

RING, GATHER = "ring", "gather"


@dataclass(frozen=True)
class ModelShape:
    """Attention of one rank: its decoder layers, its share of query and K/V heads, head dim, dtype of K and V."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def flops(self, heads: int) -> int:
        """Of one (query, key) pair in `heads` query heads."""
        return 4 * heads * self.head_dim

    def kv_bytes(self, heads: int) -> int:
        """Keys and values of one row in `heads` K/V heads."""
        return 2 * heads * self.head_dim * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Partial results of one row."""
        return self.q_heads * self.head_dim * state_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Link:
    """Messages to another rank while all ranks send."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Constants:
    """What one rank of this machine does. call_s: seconds of a kernel call with next to no work in it.

    memory_bytes_per_s: bytes read or written while partial results are merged and keys reordered.
    bytes_per_s, latency_s: of messages to another rank of the same node while all ranks send.
    across: the same to other nodes; None where there are none.
    """

    attention_flops_per_s: float
    bytes_per_s: float
    latency_s: float
    memory_bytes_per_s: float
    call_s: float = 0.0
    across: Link | None = None

    @property
    def inside(self) -> Link:
        return Link(self.bytes_per_s, self.latency_s)


def predict(
    layout: BatchLayout,
    shape: ModelShape,
    constants: Constants,
    holdings: Holdings | None = None,
    done_before: bool = False,
    nodes: int = 1,
) -> dict[str, float]:
    """Seconds per schedule. The same numbers wherever the arguments are the same.

    holdings: what travels, by default the new rows' keys. done_before: cached keys are no concern of the schedule.
    nodes: on how many the ranks lie. Raises ConfigError when that does not divide them, or constants know of one only.
    """
    if nodes > 1 and constants.across is None:
        raise ConfigError(f"constants of one node for {nodes}", "Constants(across=Link(..))", "calibrate on this ring")
    work = _Work(layout, holdings or Holdings(layout), done_before, Nodes(layout.ranks, nodes))
    return {
        RING: shape.layers * _ring_s(work, shape, constants),
        GATHER: shape.layers * _gather_s(work, shape, constants),
    }


def choose(predictions: dict[str, float]) -> str:
    """The schedule with the least seconds; the ring, which holds less at once, where they are equal."""
    return min(predictions, key=lambda schedule: (predictions[schedule], schedule != RING))


def pairs_between(layout: Layout) -> Tensor:
    """int64 [C, C]: (query, key) pairs of rank r's rows with the new rows of rank s; cached keys not counted."""
    owner, lengths = layout.owner().unique_consecutive(return_counts=True)
    held = one_hot(owner, layout.ranks) * lengths.unsqueeze(-1)
    pairs = held.T @ (held.cumsum(0) - held)  # each stretch of rows, with all before it
    inside = one_hot(owner, layout.ranks).T @ (lengths * (lengths + 1) // 2)
    return pairs + torch.diag(inside)


class _Work:
    """Counts per rank and source, summed over requests. Requests of which a rank has no row cost it nothing."""

    def __init__(self, layout: BatchLayout, holdings: Holdings, done_before: bool, nodes: Nodes):
        self.ranks, self.nodes, ranks = layout.ranks, nodes, range(layout.ranks)
        held = torch.tensor([[len(rows) for rows in own.rows] for own in layout.requests])
        brought = torch.tensor(
            [[len(holdings.positions(rank, i)) for rank in ranks] for i in range(len(layout.requests))]
        )
        starts = torch.tensor([0 if done_before else own.start for own in layout.requests])
        here = torch.zeros_like(starts) if holdings.residence else starts
        cached, some, seen = (here > 0).long(), (held > 0).long(), (brought > 0).long()
        resting = brought - held  # travels
        self.rows: list[int] = holdings.counts
        self.pairs: list[list[int]] = (sum(pairs_between(own) for own in layout.requests) + held.T @ resting).tolist()
        self.calls: list[list[int]] = (some.T @ seen).tolist()
        self.merged: list[list[int]] = (held.T @ seen).tolist()
        self.prefix_pairs: list[int] = (here @ held).tolist()
        self.prefix_calls: list[int] = (cached @ some).tolist()
        self.prefix_merged: list[int] = (cached @ held).tolist()
        self.requests: list[int] = some.sum(0).tolist()
        before = (torch.tensor([own.start for own in layout.requests]) - starts).tolist()
        stops = [
            [int(rows[-1]) + 1 - first if len(rows) else 0 for rows in own.rows]
            for own, first in zip(layout.requests, before)
        ]
        self.keys_seen: list[int] = torch.tensor(stops).sum(0).tolist()


def _ring_s(work: _Work, shape: ModelShape, constants: Constants) -> float:
    ranks = range(work.ranks)

    def compute(calls: int, pairs: int, merged: int) -> float:
        merge_s = 3 * merged * shape.state_bytes / constants.memory_bytes_per_s
        return _attend_s(calls, pairs, shape.q_heads, shape, constants) + merge_s

    seconds = max(compute(work.prefix_calls[r], work.prefix_pairs[r], work.prefix_merged[r]) for r in ranks)
    all_hops, largest, each = [ring_hops(rank, work.nodes) for rank in ranks], max(work.rows), work.nodes.each
    inside_s, across_s = (
        _send_s(1, largest, shape.kv_heads, shape, link) if link else 0.0
        for link in (constants.inside, constants.across)
    )
    for first in range(0, work.ranks, each):
        round_s = 0.0
        for number in range(first, first + each):
            sources = [hops[number].source for hops in all_hops]
            compute_s = max(
                compute(work.calls[r][s], work.pairs[r][s], work.merged[r][s]) for r, s in enumerate(sources)
            )
            round_s += compute_s if number + 1 == first + each else max(compute_s, inside_s)
        seconds += round_s if first + each == work.ranks else max(round_s, across_s)
    return seconds


def _gather_s(work: _Work, shape: ModelShape, constants: Constants) -> float:
    return max(_gather_rank_s(rank, work, shape, constants) for rank in range(work.ranks))


def _gather_rank_s(rank: int, work: _Work, shape: ModelShape, constants: Constants) -> float:
    group = shape.q_heads // shape.kv_heads
    pairs = sum(work.pairs[rank]) + work.prefix_pairs[rank]
    compute, inside, across = [], [], []
    for stage in head_stages(shape.kv_heads):
        heads = stage.stop - stage.start
        copy_s = _copy_s(work.keys_seen[rank], heads, shape, constants)
        compute.append(_attend_s(work.requests[rank], pairs, group * heads, shape, constants) + copy_s)
        inside_s, across_s = _gather_sends_s(rank, heads, work, shape, constants)
        inside.append(inside_s)
        across.append(across_s)
    following = zip_longest(compute, inside[1:], across[2:], fillvalue=0.0)
    return across[0] + max([inside[0], *across[1:2]]) + sum(max(stage) for stage in following)


def _gather_sends_s(rank: int, heads: int, work: _Work, shape: ModelShape, constants: Constants) -> tuple[float, float]:
    """A stage's seconds (inside the node, across nodes); on one link all of them are the first. A link takes what goes
    and what comes at once."""
    rows, nodes = work.rows, work.nodes
    if not nodes.two_links:
        link, others = constants.inside if nodes.count == 1 else constants.across, work.ranks - 1
        return _send_s(others, max(sum(rows) - rows[rank], others * rows[rank]), heads, shape, link), 0.0
    abroad = nodes.counterparts(rank)
    coming = sum(rows[other] for other in abroad)
    across_s = _send_s(len(abroad), max(coming, len(abroad) * rows[rank]), heads, shape, constants.across)
    column, others = coming + rows[rank], nodes.each - 1
    inside = max(sum(rows) - column, others * column)
    return _send_s(others * nodes.count, inside, heads, shape, constants.inside), across_s


def _attend_s(calls: int, pairs: int, q_heads: int, shape: ModelShape, constants: Constants) -> float:
    return calls * constants.call_s + pairs * shape.flops(q_heads) / constants.attention_flops_per_s


def _send_s(messages: int, rows: int, kv_heads: int, shape: ModelShape, link: Link) -> float:
    return messages * link.latency_s + rows * shape.kv_bytes(kv_heads) / link.bytes_per_s


def _copy_s(rows: int, kv_heads: int, shape: ModelShape, constants: Constants) -> float:
    return 2 * rows * shape.kv_bytes(kv_heads) / constants.memory_bytes_per_s
