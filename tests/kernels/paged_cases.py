"""Requests whose keys lie in shuffled pages over C ranks' pools, and what attention over them must be.

q        [T, Hq, D]        keys of request b [L, Hkv, D], by position, as no rank has them
pools    per rank [slots, Hkv, D], NaN wherever no kept token lies; page 0 is the padding page
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.kernels import PageTable, join_partials, paged_attention
from sglang_mm.types import Residence
from tests.kernels.oracle import exact, tolerances

SCALE = 0.3
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Case:
    """counts: query rows of each request; None: one each. keys, values: by request."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    rows: Tensor
    residences: list[Residence]
    pools: list[tuple[Tensor, Tensor]]
    counts: list[int] | None

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self.keys))

    @property
    def queries_ptr(self) -> Tensor | None:
        return None if self.counts is None else torch.tensor([0, *self.counts]).cumsum(0).to(self.q.device)

    def table(self, rank: int, lengths: list[int] | None = None) -> PageTable:
        lengths = self.lengths if lengths is None else lengths
        on_device = torch.tensor(lengths, dtype=torch.int64, device=self.q.device)
        return PageTable(self.slots, self.rows, on_device, lengths, self.residences[rank])

    def attend(self, rank: int, backend: str = "auto", **changes) -> tuple[Tensor, Tensor]:
        """What this rank computes. changes: planted errors, or other ways to ask."""
        given = {"table": self.table(rank), "scale": SCALE, "queries_ptr": self.queries_ptr, "backend": backend}
        return paged_attention(self.q, *self.pools[rank], **given | changes)

    def everywhere(self, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """All ranks, joined."""
        found = [self.attend(rank, backend) for rank in range(len(self.pools))]
        return join_partials(*(torch.stack(each) for each in zip(*found)))

    def to(self, device) -> "Case":
        moved = {name: getattr(self, name).to(device) for name in ("q", "slots", "rows")}
        pools = [tuple(each.to(device) for each in pair) for pair in self.pools]
        return Case(**vars(self) | moved | {"pools": pools})


def draw(
    ranks: int,
    share: int,
    lengths: list[int],
    *,
    heads: tuple[int, int, int] = (4, 2, 8),
    dtype: torch.dtype = torch.float64,
    counts: list[int] | None = None,
    seed: int = 0,
) -> Case:
    """heads: Hq, Hkv, D."""
    generator = torch.Generator().manual_seed(seed)
    page, (query_heads, kv_heads, dim) = ranks * share, heads
    context = max([1, *lengths]) + page  # some room that no request uses
    pages = [-(-length // page) for length in lengths]
    slots = torch.full((len(lengths) + 2, context), -(10**6), dtype=torch.int32)
    rows = torch.randperm(len(slots), generator=generator)[: len(lengths)]
    taken = (1 + torch.randperm(sum(pages) + 2, generator=generator))[: sum(pages)].split(pages)
    pools = [torch.full((2, (sum(pages) + 3) * share, kv_heads, dim), NAN, dtype=dtype) for _ in range(ranks)]
    keys, values = [], []
    for row, length, ids in zip(rows, lengths, taken):
        kv = torch.randn(2, length, kv_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        for position in range(length):
            number, offset = int(ids[position // page]), position % page
            slots[row, position] = number * page + offset
            pools[offset // share][:, number * share + offset % share] = kv[:, position]
        keys.append(kv[0])
        values.append(kv[1])
    total = len(lengths) if counts is None else sum(counts)
    q = torch.randn(total, query_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    residences = [Residence(ranks, rank, page) for rank in range(ranks)]
    return Case(q, keys, values, slots, rows, residences, [tuple(pool) for pool in pools], counts)


def assert_exact(got: tuple[Tensor, Tensor], case: Case, rank: int | None = None, merges: int = 1) -> None:
    """Compare with dense attention in fp64 over the keys that `rank` keeps, or over all, request by request.

    merges: of partial results, one for each chunk, part or rank. Weights of 16-bit inputs are rounded to them before
    they meet the values: half an eps of the largest value. A dense result of few keys can be exact by chance: one
    rounding of the largest value is allowed for each merge.
    """
    out, lse = (each.cpu() for each in got)
    for rows, kept, k, v in _requests(case, rank):
        given = (
            case.q[rows].cpu(),
            k[kept],
            v[kept],
            torch.ones(rows.stop - rows.start),
            torch.zeros(len(kept)),
            SCALE,
        )
        wanted = exact(*given)
        limits = list(tolerances(wanted, *given, out.dtype, merges))
        if len(kept):
            largest = float(v[kept].abs().max())
            limits[0] += (1 + merges) * torch.finfo(out.dtype).eps * largest
            limits[0] += torch.finfo(k.dtype).eps / 2 * largest if k.dtype.itemsize == 2 else 0
        for name, one, want, limit in zip(("out", "lse"), (out[rows], lse[:, rows]), wanted, limits):
            assert one.shape == want.shape, f"{name}: {one.shape}, not {want.shape}"
            assert torch.equal(one.isinf(), want.isinf()) and not one.isnan().any(), (
                f"{name}: NaN, or rows without keys"
            )
            error = float((one - want).nan_to_num(nan=0).abs().max()) if one.numel() else 0.0  # -inf - -inf
            assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


def _requests(case: Case, rank: int | None):
    """(query rows, kept positions, keys, values) of each."""
    page, share, first = case.residences[0].page, case.residences[0].share, 0
    for number, (k, v) in enumerate(zip(case.keys, case.values)):
        rows = slice(first, first + (1 if case.counts is None else case.counts[number]))
        kept = [p for p in range(len(k)) if rank is None or p % page // share == rank]
        yield rows, torch.tensor(kept, dtype=torch.int64), k, v
        first = rows.stop
