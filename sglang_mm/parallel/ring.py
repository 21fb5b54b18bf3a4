"""Ring attention: K/V pieces go around the ranks, each rank attends to a piece while the next one is on its way.

    hop      0            1            2            3
    rank 0   own piece    of rank 3    of rank 2    of rank 1        C = 4; C-1 hops

On several nodes pieces go around inside each while the next node's are on their way: nodes.py has the order. A
schedule is an iterator of pieces and does not care where they rest. T tokens, H heads, D head dim.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import empty_state, merge
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.nodes import Send, ring_hops
from sglang_mm.parallel.pieces import Attend, Piece, Prefix, State, cached_rows, causal, expect_rows
from sglang_mm.parallel.stopwatch import Watch, unwatched
from sglang_mm.parallel.transport import Transfer, Transport
from sglang_mm.types import BatchLayout


def ring_pieces(
    k: Tensor, v: Tensor, rows: Sequence[int], transport: Transport, *, watch: Watch = unwatched
) -> Iterator[Piece]:
    """The own piece, then all others in the order of nodes.py, on one node those of rank - 1, rank - 2, ...; the next
    one travels while the caller computes, and one of the next node meanwhile.

    k, v [T, Hkv, D] that this rank brings; rows: T of every rank. Ranks with T = 0 take part. Every rank must consume
    all pieces. No more than nodes.pieces_at_once() are held. watch: stage `transport`, the waits for pieces. Raises
    ConfigError when k, v do not have rows[rank] rows, RingBroken past the deadline.
    """
    size, rank = transport.size, transport.rank
    if len(rows) != size or k.shape != v.shape or len(k) != rows[rank]:
        given = f"rank {rank} of {size}: k {tuple(k.shape)}, v {tuple(v.shape)}, rows {list(rows)}"
        raise ConfigError(given, "k and v alike, with rows[rank] rows", "take rows from the batch's holdings")
    piece, under_way = torch.stack([k, v]), {}
    hops = ring_hops(rank, transport.topology)
    for number, hop in enumerate(hops):
        if number:
            with watch("transport"):
                (piece,) = under_way.pop(number).wait()
        for send in hop.sends:
            under_way[send.due] = _send(piece, rows[hops[send.due].source], send, transport)
        yield Piece(hop.source, piece[0], piece[1])


def _send(piece: Tensor, rows: int, send: Send, transport: Transport) -> Transfer:
    """rows: of the piece that comes meanwhile."""
    arrival = piece.new_empty(2, rows, *piece.shape[2:])
    stage = f"ring hop {send.due} of {transport.size - 1}"
    if send.across and transport.topology.two_links:
        stage += ", across nodes"
    return Transfer([arrival], transport.exchange({send.to: [piece]}, {send.by: [arrival]}, stage, "kv"))


def attend_pieces(
    q: Tensor,
    layout: BatchLayout,
    rank: int,
    pieces: Iterable[Piece],
    *,
    scale: float,
    holdings: Holdings | None = None,
    prefix: Prefix | None = None,
    state: State | None = None,
    backend: str = "auto",
    attend: Attend | None = None,
    watch: Watch = unwatched,
) -> Tensor:
    """Attention of this rank's rows over their prompts' cached keys and all pieces: out [Tq, Hq, D] as q.

    q [Tq, Hq, D]: the rank's rows of all requests, in layout order. Partial results are merged in fp32 (fp64 for fp64).
    holdings: what the pieces hold, by default the new rows' keys alone. Cached keys are in `prefix`, on this rank, or
    in the pieces, or their part of the result is in `state`, which is written to. attend: how rows meet keys, by
    default `causal`. watch: stage `attention`, its merges included. Raises ConfigError when q, a piece or a prefix does
    not have the rows that layout and holdings say.
    """
    expect_rows("q", q, layout.rows(rank))
    holdings = holdings or Holdings(layout)
    out, lse = state or empty_state(q)
    mine = layout.segments(rank)

    attend = attend or causal(scale, backend)

    def add(request: int, source: int | None, k: Tensor, v: Tensor, positions: Tensor) -> None:
        rows, queries = mine[request], layout.requests[request].rows[rank]
        if len(queries) and len(positions):
            with watch("attention"):
                partial = attend(request, source, slice(None), q[rows], k, v, queries, positions)
                merge(out[rows], lse[:, rows], *partial)

    if state is None and holdings.residence is None:
        for request, start in enumerate(layout.start for layout in layout.requests):
            add(request, None, *cached_rows(prefix, request, start, q), torch.arange(start))
    for piece in pieces:
        expect_rows(f"piece of rank {piece.source}", piece.k, holdings.rows(piece.source))
        for request, theirs in enumerate(holdings.segments(piece.source)):
            positions = holdings.positions(piece.source, request)
            add(request, piece.source, piece.k[theirs], piece.v[theirs], positions)
    return out.to(q.dtype)
