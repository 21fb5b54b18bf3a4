"""A small stack of attention layers as served: per layer a check of what all agreed on, then one of the schedules.

Every schedule is the package's own. A layer's prompts are random, the same on all ranks, and known to the dense oracle.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sglang_mm.kernels import causal_attention
from sglang_mm.parallel.gather import GatherTables, attend_gathered
from sglang_mm.parallel.pass_q import attend_resting
from sglang_mm.parallel.pieces import Attend, causal
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.parallel.transport import Transport
from sglang_mm.types import Residence, Run
from tests.kernels.oracle import dense
from tests.parallel.prompts import SCALE, Prompts, make_prompts

LAYERS = 6
SCHEDULES = ("ring", "gather", "pass_q")
CLOSE = 1e-10  # sums of some hundred fp64 products err by 1e-14; a lost or doubled row by 1e-2
BATCH = [[Run(240, 90)], [Run(0, 60)], [Run(50, 7)]]
PAGE_PER_RANK = 8
Struck = Callable[[], None]
"""Called whenever attention starts to compute: where a fault strikes."""


@cache
def prompts_of(layer: int, ranks: int) -> Prompts:
    return make_prompts(BATCH, ranks, torch.float64, heads=(4, 2, 16), seed=layer)


@cache
def expected(layer: int, ranks: int, rank: int) -> Tensor:
    """[T, Hq, D]: what the rank's rows must come to."""
    prompts = prompts_of(layer, ranks)
    rows = []
    for request, own in enumerate(prompts.layout.requests):
        rows.append(dense(*prompts.inputs(request))[0][own.rows[rank] - own.start])
    return torch.cat(rows)


def run_layer(layer: int, schedule: str, transport: Transport, struck: Struck, digest: int) -> float:
    """The largest error of this rank's rows. digest: what this rank holds for the plan of the layer."""
    transport.check_equal(digest, f"plan of layer {layer}")
    prompts = prompts_of(layer, transport.size)
    out = ATTENTION[schedule](prompts, transport, struck)
    return float((out - expected(layer, transport.size, transport.rank)).abs().max())


def last_rows(transport: Transport) -> None:
    """As after the last layer: what the ranks have computed for the next token goes to all of them."""
    mine = torch.full((1, 8), float(transport.rank))
    parts = transport.all_to_all([mine] * transport.size, [1] * transport.size, "exchange of the asked rows", host=True)
    assert [part[0, 0].item() for part in parts] == list(range(transport.size))


def _attend(struck: Struck) -> Attend:
    kernel = causal(SCALE)

    def attend(*arguments):
        struck()
        return kernel(*arguments)

    return attend


def _ring(prompts: Prompts, transport: Transport, struck: Struck, **kwargs) -> Tensor:
    rank, rows = transport.rank, [prompts.layout.rows(rank) for rank in range(transport.size)]
    q, k, v = (prompts.shard(tensors, rank) for tensors in (prompts.q, prompts.k, prompts.v))
    pieces = ring_pieces(k, v, rows, transport)
    return attend_pieces(q, prompts.layout, rank, pieces, scale=SCALE, attend=_attend(struck), **kwargs)


def _ring_over_prefix(prompts: Prompts, transport: Transport, struck: Struck) -> Tensor:
    return _ring(prompts, transport, struck, prefix=prompts.prefix)


def _gathered(prompts: Prompts, transport: Transport, struck: Struck) -> Tensor:
    q, k, v = (prompts.shard(tensors, transport.rank) for tensors in (prompts.q, prompts.k, prompts.v))
    tables = GatherTables(prompts.layout, q.device)
    return attend_gathered(q, k, v, tables, transport, scale=SCALE, prefix=prompts.prefix, attend=_attend(struck))


def _queries_travel(prompts: Prompts, transport: Transport, struck: Struck) -> Tensor:
    """Cached keys rest on all ranks and queries come to them; the new keys go around."""
    layout, rank = prompts.layout, transport.rank
    residence = Residence(transport.size, rank, PAGE_PER_RANK * transport.size)

    def attend_here(queries: Tensor, source: int) -> tuple[Tensor, Tensor]:
        struck()
        partials = []
        for request, rows in enumerate(layout.segments(source)):
            kept = residence.positions(0, layout.requests[request].start)
            k, v = prompts.k[request][kept], prompts.v[request][kept]
            beyond = torch.full((rows.stop - rows.start,), len(k))
            partials.append(causal_attention(queries[rows], k, v, beyond, torch.arange(len(k)), scale=SCALE))
        return torch.cat([out for out, _ in partials]), torch.cat([lse for _, lse in partials], dim=1)

    q, rows = prompts.shard(prompts.q, rank), [layout.rows(each) for each in range(transport.size)]
    state = attend_resting(q, rows, transport, attend_here)
    return _ring(prompts, transport, lambda: None, state=state)


ATTENTION = {"ring": _ring_over_prefix, "gather": _gathered, "pass_q": _queries_travel}
