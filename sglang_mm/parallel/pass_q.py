"""Schedule `pass_q`: queries go to the ranks where cached keys rest, and partial results come back.

    hop      0             1                     2                       C = 4; C - 1 hops and as many ways back
    rank 0   own queries   queries of rank 3     queries of rank 2
                           results to rank 3     results to rank 2

For few rows over a long cached prefix: a follow-up question's queries are a thousandth of the keys they look at.
T rows of a rank, H heads, D head dim.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from sglang_mm.kernels import empty_state, merge
from sglang_mm.parallel.stopwatch import Watch, unwatched
from sglang_mm.parallel.transport import Transport

AttendHere = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(queries [T, Hq, D] of the rows of rank `source`, source) -> (out [T, Hq, D], lse [Hq, T]) over this rank's keys."""


def attend_resting(
    q: Tensor, rows: Sequence[int], transport: Transport, attend_here: AttendHere, *, watch: Watch = unwatched
) -> tuple[Tensor, Tensor]:
    """State (out [T, Hq, D], lse [Hq, T], as merge() takes them) of this rank's rows over the keys of all ranks.

    q [T, Hq, D] of this rank's rows; rows: T of every rank, 0 included. Collective. Partial results are merged in the
    order of the hops, so a row's bits depend on its rank alone. Raises RingBroken past the deadline.
    """
    size, rank = transport.size, transport.rank
    state, queries = empty_state(q), q
    for hop in range(size):
        source, holder = (rank - hop) % size, (rank + hop) % size
        if hop + 1 < size:
            following = q.new_empty(rows[(source - 1) % size], *q.shape[1:])
            send, receive = {(rank + hop + 1) % size: [q]}, {(source - 1) % size: [following]}
            arrived = transport.exchange(send, receive, f"pass_q hop {hop + 1} of {size - 1}", "queries")
        with watch("attention"):
            partial = attend_here(queries, source)
        if hop:
            mine = empty_state(q)
            back = {source: [tensor.contiguous() for tensor in partial]}, {holder: list(mine)}
            returned = transport.exchange(*back, f"pass_q results of hop {hop}", "queries")
            with watch("transport"):
                returned(False)
            partial = mine
        with watch("attention"):
            merge(*state, *partial)
        if hop + 1 < size:
            with watch("transport"):
                arrived(False)
            queries = following
    return state


def travels(prefix_rows: int, new_rows: int, kv_bytes: int, query_bytes: int, state_bytes: int) -> bool:
    """Whether cached keys should travel rather than queries: whatever is fewer bytes on each rank's link.

    Rows of the whole batch; bytes of one row: its keys and values, its queries, its partial result. C ranks pass on
    (C - 1) / C of either, and compute the same.
    """
    return prefix_rows * kv_bytes < new_rows * (query_bytes + state_bytes)
