"""Random prompts with known answers: sharded over ranks by a layout, attended densely in one place. torch only.

Used by the tests of every transport, so that threads, gloo processes and GPUs answer the same question.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.kernels.merge import state_dtype
from sglang_mm.parallel.gather import GatherTables, attend_gathered
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.parallel.stopwatch import Watch, unwatched
from sglang_mm.parallel.transport import Transport
from sglang_mm.types import BatchLayout, Run
from tests.kernels.oracle import dense, tolerances

SCALE = 0.25
SHORT = [Run(0, 2)]
CACHED = [Run(300, 5), Run(305, 150, 3, "video"), Run(455, 40)]
ONE_CACHED = [Run(77, 1)]


def mixed(ranks: int) -> list[Run]:
    """A video long enough to be cut in zigzag pieces, between two striped texts."""
    tokens = 4 * (64 * ranks + 3)
    return [Run(0, 20), Run(20, tokens, 4, "video"), Run(20 + tokens, 33)]


def batch(ranks: int) -> list[list[Run]]:
    """Zigzag pieces and stripes, a prompt shorter than the ring, and cached prefixes."""
    return [mixed(ranks), SHORT, CACHED, ONE_CACHED]


@dataclass
class Prompts:
    """Per request: q of the new rows, k and v of the whole prompt; one layout for all."""

    layout: BatchLayout
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    def shard(self, tensors: list[Tensor], rank: int) -> Tensor:
        """This rank's rows of every request. The tensors end where the prompts do: rows are counted from the end."""
        held = zip(tensors, self.layout.requests)
        return torch.cat([x[own.rows[rank].to(x.device) - own.start - own.length] for x, own in held])

    def prefix(self, request: int) -> tuple[Tensor, Tensor] | None:
        start = self.layout.requests[request].start
        return (self.k[request][:start], self.v[request][:start]) if start else None

    def inputs(self, request: int) -> tuple:
        """Arguments of the oracle."""
        own = self.layout.requests[request]
        positions = torch.arange(own.start, own.start + own.length), torch.arange(own.start + own.length)
        return self.q[request], self.k[request], self.v[request], *positions, SCALE


def make_prompts(
    requests: list[list[Run]], ranks: int, dtype: torch.dtype, device="cpu", heads=(2, 1, 20), seed=0
) -> Prompts:
    query_heads, kv_heads, dim = heads
    draw = torch.Generator().manual_seed(seed)
    layout = BatchLayout(tuple(make_layout(runs, ranks) for runs in requests))

    def random(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, dim, generator=draw, dtype=torch.float64).to(device, dtype)

    q = [random(own.length, query_heads) for own in layout.requests]
    k, v = ([random(own.start + own.length, kv_heads) for own in layout.requests] for _ in range(2))
    return Prompts(layout, q, k, v)


def ring_attention(
    prompts: Prompts, transport: Transport, backend: str = "auto", keep=lambda piece: True, watch: Watch = unwatched
) -> Tensor:
    """One rank's output. keep: drops pieces on purpose, for controls that must fail."""
    rank, rows = transport.rank, [prompts.layout.rows(rank) for rank in range(transport.size)]
    q, k, v = (prompts.shard(tensors, rank) for tensors in (prompts.q, prompts.k, prompts.v))
    pieces = filter(keep, ring_pieces(k, v, rows, transport, watch=watch))
    options = {"scale": SCALE, "prefix": prompts.prefix, "backend": backend, "watch": watch}
    return attend_pieces(q, prompts.layout, rank, pieces, **options)


def gathered_attention(prompts: Prompts, transport: Transport, backend: str = "auto", **kwargs) -> Tensor:
    """The same by the schedule `gather`."""
    q, k, v = (prompts.shard(tensors, transport.rank) for tensors in (prompts.q, prompts.k, prompts.v))
    tables = GatherTables(prompts.layout, q.device)
    kwargs = {"scale": SCALE, "prefix": prompts.prefix, "backend": backend, **kwargs}
    return attend_gathered(q, k, v, tables, transport, **kwargs)


SCHEDULES = {"ring": ring_attention, "gather": gathered_attention}


def ring_errors(prompts: Prompts, outputs: list[Tensor]) -> list[tuple[float, float]]:
    """Per request (largest error against fp64 dense attention, largest error allowed)."""
    flat = torch.full_like(torch.cat(prompts.q), float("nan"))
    for rank, out in enumerate(outputs):
        flat[prompts.layout.flat(rank).to(flat.device)] = out.to(flat.device)
    errors = []
    for request, out in enumerate(flat.split([own.length for own in prompts.layout.requests])):
        expected, allowed = _expected(prompts, request)
        errors.append((float((out.double() - expected).abs().max()), allowed))
    return errors


def _expected(prompts: Prompts, request: int) -> tuple[Tensor, float]:
    q, k, v, *rest = prompts.inputs(request)
    expected = dense(q.double(), k.double(), v.double(), *rest)
    allowed, _ = tolerances(expected, q, k, v, *rest, dtype=state_dtype(q.dtype), merges=prompts.layout.ranks)
    return expected[0], allowed + torch.finfo(q.dtype).eps * float(expected[0].abs().max())  # one rounding at the end


def assert_ring_equals_dense(prompts: Prompts, outputs: list[Tensor]) -> None:
    for request, (error, allowed) in enumerate(ring_errors(prompts, outputs)):
        assert error <= allowed, f"request {request}: error {error:.2e} > {allowed:.2e}"
