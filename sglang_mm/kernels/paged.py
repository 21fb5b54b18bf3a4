"""Attention of a few query rows over keys that rest in the page pools of several ranks: the part that one rank keeps.

    decode     one row per request      --> every rank: all rows over the keys it keeps --> merge_partials
    follow-up  some rows per request    --> the same over the cached prefix, and `causal_attention` among the new rows

T query rows, Hq query heads, Hkv K/V heads, G = Hq / Hkv, B requests, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import cpu_flash, reference
from sglang_mm.kernels.merge import empty_state, merge
from sglang_mm.kernels.problem import problem_of
from sglang_mm.kernels.triton_backend import paged as by_triton
from sglang_mm.types import Residence

KEYS = 1 << 15
"""Kept keys that the torch backends copy out of the pool at once: 64 MiB of keys and values with Hkv * D = 256."""


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the keys of B requests are.

    slots: int32 [R, context], SGLang's `req_to_token`: the logical slot of each position. A request's first token is
    the first of a page, whose slots follow each other. rows: int [B], which row of `slots` each request uses.
    lengths: int [B], keys of each request on all ranks together, at most `context`. All three on the device of q.
    lengths_cpu: the same on the host, for backends that need shapes; without it they wait for the device.
    """

    slots: Tensor
    rows: Tensor
    lengths: Tensor
    lengths_cpu: Sequence[int] | Tensor | None
    residence: Residence


def paged_attention(
    q_THD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: PageTable,
    *,
    scale: float,
    queries_ptr: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query row over all keys of its request that this rank keeps.

    q_THD [T, Hq, D], k_pool and v_pool [N, Hkv, D], this rank's local slots; fp64, fp32, fp16 or bf16, one dtype and
    device. scale > 0. queries_ptr: int [B + 1] on that device, rows ptr[b] .. ptr[b + 1] - 1 are of request b, and
    ptr[B] = T; None: row b is of request b, and T = B.
    Returns out [T, Hq, D] and the natural log-sum-exp of the scaled scores, lse [Hq, T]: fp64 for fp64 inputs, fp32 for
    all others; (0, -inf) where this rank keeps no key.
    backend: `reference` any device; `cpu_flash` CPU; `triton` CUDA: it never waits for the device, and shapes alone
    decide what it launches, so that it can be captured in a CUDA graph; `auto` the first of cpu_flash, triton and
    reference that can run.
    Raises ConfigError for shapes, dtypes or a backend that cannot work. Numbers in the tables on CUDA are not checked.
    """
    _validate(q_THD, k_pool, v_pool, table, queries_ptr)
    if not scale > 0:
        raise ConfigError(f"scale {scale}", "a number above 0", "pass 1 / sqrt(head dim)")
    attend = BACKENDS[backend_for(q_THD, k_pool, backend)]
    return attend(q_THD, k_pool, v_pool, table, queries_ptr, scale)


def _in_torch(attend: Callable) -> Callable:
    """A backend that goes from request to request. attend: of `causal_attention`, to which all keys are in the past."""

    def run(q_THD: Tensor, k_pool: Tensor, v_pool: Tensor, table: PageTable, queries_ptr: Tensor | None, scale: float):
        out, lse = empty_state(q_THD)
        lengths = table.lengths if table.lengths_cpu is None else torch.as_tensor(table.lengths_cpu)
        ptr = range(len(q_THD) + 1) if queries_ptr is None else queries_ptr.tolist()
        for first, stop, row, length in zip(ptr, ptr[1:], table.rows.tolist(), lengths.tolist()):
            if first < stop:
                rows, slots = slice(first, stop), _slots(table, row, length)
                out[rows], lse[:, rows] = _attend_request(
                    attend, q_THD[rows], k_pool, v_pool, slots, table.residence, scale
                )
        return out, lse

    return run


def _slots(table: PageTable, row: int, length: int) -> Tensor:
    context = table.slots.shape[1]
    if not 0 <= length <= context:
        raise ConfigError(f"a request of {length} keys", f"0 .. {context}, a row of slots", "give its own length")
    return table.slots[row, :length]


def _attend_request(attend, q_THD: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, residence: Residence, scale):
    """Heads that share keys become rows, so that the keys are read once for all of them."""
    (rows, heads, dim), kv_heads = q_THD.shape, k_pool.shape[1]
    q_XHD = q_THD.reshape(rows, kv_heads, -1, dim).transpose(1, 2).reshape(-1, kv_heads, dim)
    out, lse = empty_state(q_XHD)
    step = -(-KEYS // residence.share) * residence.page
    for start in range(0, len(slots), step):
        kept = residence.positions(start, min(start + step, len(slots))).to(slots.device)
        if len(kept):
            at = residence.local(slots[kept]).long()
            held = (pool.index_select(0, at) for pool in (k_pool, v_pool))  # by rows: faster than pool[at]
            pos_k = torch.arange(len(at))
            merge(out, lse, *attend(q_XHD, *held, torch.full((len(q_XHD),), len(at)), pos_k, scale))
    out = out.view(rows, -1, kv_heads, dim).transpose(1, 2).reshape(rows, heads, dim)
    return out, lse.view(kv_heads, rows, -1).transpose(1, 2).reshape(heads, rows)


BACKENDS = {
    "cpu_flash": _in_torch(cpu_flash.attend),
    "triton": by_triton.attend,
    "reference": _in_torch(reference.attend),
}
"""In the order in which `auto` tries them."""


def backend_for(q: Tensor, k: Tensor, backend: str = "auto") -> str:
    """The backend that runs on q [.., Hq, D] and the pool k [N, Hkv, D]. Raises ConfigError where it cannot."""
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend {backend!r}", f"auto, {', '.join(BACKENDS)}", "pass backend='auto'")
    on_cpu = q.device.type == "cpu"
    why_not = {"cpu_flash": None if on_cpu else f"needs tensors on cpu, not {q.device}"}
    if backend == "triton" or (backend == "auto" and not on_cpu):
        why_not["triton"] = by_triton.unfit(problem_of(q, k))
    if why_not.get(backend):
        raise ConfigError(f"backend {backend!r}: {why_not[backend]}", "one that can run here", "pass backend='auto'")
    return next(name for name in BACKENDS if not why_not.get(name)) if backend == "auto" else backend


def _validate(q: Tensor, k: Tensor, v: Tensor, table: PageTable, queries_ptr: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ConfigError(shapes, "q [T,Hq,D], k and v [N,Hkv,D], Hq a multiple of Hkv", "check the head split")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        given = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ConfigError(f"q, k, v of {given}", "one dtype on one device", "convert q to the dtype of the pools")
    _validate_tables(len(q), q.device, table, queries_ptr)


def _validate_tables(rows: int, device: torch.device, table: PageTable, queries_ptr: Tensor | None) -> None:
    requests = len(table.lengths)
    on_host = requests if table.lengths_cpu is None else len(table.lengths_cpu)
    if len(table.rows) != requests or on_host != requests:
        given = f"{len(table.rows)} rows, {requests} lengths, {on_host} of them on the host"
        raise ConfigError(given, "one of each per request", "leave other requests out of all three")
    if (rows != requests) if queries_ptr is None else (queries_ptr.shape != (requests + 1,)):
        ptr = "none" if queries_ptr is None else tuple(queries_ptr.shape)
        given = f"{rows} query rows of {requests} requests, queries_ptr {ptr}"
        raise ConfigError(given, f"a row each, or queries_ptr ({requests + 1},)", "say which rows each request has")
    tables = [table.slots, table.rows, table.lengths, *([] if queries_ptr is None else [queries_ptr])]
    if table.slots.dtype != torch.int32 or table.slots.stride(1) != 1 or any(each.device != device for each in tables):
        given = f"slots of {table.slots.dtype}, tables on {', '.join(sorted({str(each.device) for each in tables}))}"
        raise ConfigError(given, f"int32 slots [R, context], dense rows, all on {device}", "pass SGLang's own table")
