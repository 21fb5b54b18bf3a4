"""A decoding step over keys that rest in pages: what one rank of C does, in a CUDA graph, and how much of the memory's
bandwidth it uses. Pages are shuffled, as after hours of serving. What the other ranks send is taken to be there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu_suite.ceilings import COPY
from benchmarks.gpu_suite.decode_graph import DIFFERS, captured, per_step
from benchmarks.gpu_suite.oracle import State
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.spot import check_rows
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import random_qkv
from sglang_mm.kernels import PageTable, join_partials, paged_attention
from sglang_mm.types import Residence, page_for

NAME = "paged"


def time_paged(suite: Suite, point: Point) -> None:
    """For every number of ranks."""
    for width in suite.sizes.widths:
        what = f"{NAME}: decoding, {point.name}, C = {width}"
        if NAME not in suite.lost and suite.budget.allows(what, 10.0):
            with suite.trying(NAME, what):
                _time_rank(suite, point, width, what)
            suite.free()


def _time_rank(suite: Suite, point: Point, width: int, what: str) -> None:
    sizes, device = suite.sizes, suite.device
    table = shuffled_pages([point.tokens], Residence(width, 0, page_for(width)), device)
    shape = point.kv_heads, sizes.head_dim, sizes.dtype, device
    _, *pools = random_qkv(pool_slots(table), 1, *shape)
    q = random_qkv(1, point.heads, *shape, seed=1)[0]
    scale = sizes.head_dim**-0.5

    def step(backend: str = "auto" if suite.is_rehearsal else "triton") -> State:
        mine = paged_attention(q, *pools, table, scale=scale, backend=backend)
        return join_partials(*(torch.stack([each] * width) for each in mine))

    check = check_rows(
        what, NAME, q.dtype, step(), (torch.zeros(1, dtype=torch.int64, device=device), step("reference"))
    )
    suite.report.checks.append(check)
    if check.why:
        suite.report.fail(what, check.why)
        return
    eager, graph, seconds = per_step(suite, step), "no GPU", None
    if not suite.is_rehearsal:
        replay, graph = captured(step, check)
        seconds = per_step(suite, replay) if replay else None
        if graph.startswith(DIFFERS):
            suite.report.fail(f"graph of {what}", graph)
    nbytes = 2 * table.residence.held(point.tokens) * pools[0][0].nbytes
    rate = nbytes / (seconds or eager).median
    figures = {"eager ms": 1e3 * eager.median, "TB/s of K/V": rate / 1e12}
    if COPY in suite.ceilings:
        figures["of copy speed"] = rate / suite.ceilings[COPY]
    suite.report.add(NAME, {"point": point.name, "C": width}, seconds, **figures, graph=graph)


def shuffled_pages(lengths: Sequence[int], residence: Residence, device: torch.device) -> PageTable:
    """Requests whose pages lie in any order behind the padding page."""
    pages = [-(-length // residence.page) for length in lengths]
    draw = torch.Generator().manual_seed(2)
    slots = torch.zeros(len(lengths), max(pages) * residence.page, dtype=torch.int32)
    for row, ids in zip(slots, (1 + torch.randperm(sum(pages), generator=draw)).split(pages)):
        of_pages = ids[:, None] * residence.page + torch.arange(residence.page)
        row[: of_pages.numel()] = of_pages.flatten()
    on_device = torch.tensor(lengths, device=device)
    return PageTable(slots.to(device), torch.arange(len(lengths), device=device), on_device, lengths, residence)


def pool_slots(table: PageTable) -> int:
    """How many local slots the pools of such pages have."""
    pages = sum(-(-length // table.residence.page) for length in map(int, table.lengths_cpu))
    return (pages + 1) * table.residence.share


def requests_ptr(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0)
