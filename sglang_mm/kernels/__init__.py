"""Attention kernels behind one contract. They know positions, no ranks and no plans.

causal_attention(q, k, v, pos_q, pos_k, scale=...) -> (out, lse)       merge(out, lse, out_i, lse_i)
paged_attention(q, k_pool, v_pool, table, scale=...) -> (out, lse)     merge_partials(outs, lses) -> out
sparse_attention(q, k, v, programs, scale=...) -> (out, lse)           sparse_lse(q, k, programs, scale=...) -> lse
"""

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import cpu_flash, reference
from sglang_mm.kernels.merge import empty_state, join_partials, merge, merge_partials
from sglang_mm.kernels.paged import PageTable, paged_attention
from sglang_mm.kernels.problem import problem_of
from sglang_mm.kernels.selector import choose_backend, sparse_attention, sparse_lse
from sglang_mm.kernels.triton_backend import launch as by_triton

__all__ = [
    "BACKENDS", "PageTable", "causal_attention", "choose_backend", "empty_state", "join_partials", "merge",
    "merge_partials", "paged_attention", "problem_of", "sparse_attention", "sparse_lse",
]  # fmt: skip
BACKENDS = {"reference": reference.attend, "cpu_flash": cpu_flash.attend, "triton": by_triton.attend_causal}


def causal_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pos_q: Tensor, pos_k: Tensor, *, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention in which key j is visible to query i where pos_k[j] <= pos_q[i].

    q_THD [Tq, Hq, D], k_THD and v_THD [Tk, Hkv, D], one dtype and device, Hq a multiple of Hkv; Tq, Tk may be 0.
    pos_q [Tq], pos_k [Tk]: int64, ascending; best on CPU, where they are checked.
    Returns out [Tq, Hq, D] and the natural log-sum-exp of the scaled scores, lse [Hq, Tq]: fp64 for fp64 inputs, fp32
    for all others. A query that sees no key gets (0, -inf).
    backend: `reference` any device; `cpu_flash` CPU; `triton` CUDA, as a tile program; `auto` cpu_flash on CPU, triton
    where it can run, else reference. (PyTorch's CUDA flash kernels would round partial results to 16 bits.)
    Raises ConfigError for shapes, dtypes, positions or a backend that cannot work.
    """
    pos_q, pos_k = pos_q.cpu().contiguous(), pos_k.cpu().contiguous()
    _validate(q_THD, k_THD, v_THD, pos_q, pos_k)
    attend = BACKENDS[_choose(backend, q_THD, k_THD)]
    if not len(pos_q) or not len(pos_k):
        return empty_state(q_THD)
    return attend(q_THD, k_THD, v_THD, pos_q, pos_k, scale)


def _choose(backend: str, q: Tensor, k: Tensor) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r}", f"auto, {', '.join(BACKENDS)}", "pass backend='auto'")
    if backend == "cpu_flash" and q.device.type != "cpu":
        raise ConfigError(f"backend 'cpu_flash' for tensors on {q.device}", "tensors on cpu", "pass backend='auto'")
    if backend == "auto" and q.device.type == "cpu":
        return "cpu_flash"
    if backend in ("auto", "triton"):
        why = by_triton.unfit(problem_of(q, k))
        if why and backend == "triton":
            raise ConfigError(f"backend 'triton': {why}", "one that can run here", "pass backend='auto'")
        return "reference" if why else "triton"
    return backend


def _validate(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ConfigError(shapes, "q [Tq,Hq,D], k and v [Tk,Hkv,D], Hq a multiple of Hkv", "check the head split")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        given = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ConfigError(f"q, k, v of {given}", "one dtype on one device", "convert k and v to those of q")
    for name, pos, rows in (("pos_q", pos_q, len(q)), ("pos_k", pos_k, len(k))):
        if pos.shape != (rows,) or pos.dtype != torch.int64:
            given = f"{name} {pos.dtype} {tuple(pos.shape)}"
            raise ConfigError(given, f"int64 ({rows},)", "give each row its position")
        if bool((pos[1:] < pos[:-1]).any()):
            raise ConfigError(f"{name} that descends", "ascending positions", "sort the rows by position")
