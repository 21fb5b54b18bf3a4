"""Attention kernels behind one contract. They know positions, no ranks and no plans.

causal_attention(q, k, v, pos_q, pos_k, scale=...) -> (out, lse)       merge(out, lse, out_i, lse_i)
"""

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import cpu_flash, reference
from sglang_mm.kernels.merge import empty_state, merge

__all__ = ["BACKENDS", "causal_attention", "empty_state", "merge"]
BACKENDS = {"reference": reference.attend, "cpu_flash": cpu_flash.attend}


def causal_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, pos_q: Tensor, pos_k: Tensor, *, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention in which key j is visible to query i where pos_k[j] <= pos_q[i].

    q_THD [Tq, Hq, D], k_THD and v_THD [Tk, Hkv, D], one dtype and device, Hq a multiple of Hkv; Tq, Tk may be 0.
    pos_q [Tq], pos_k [Tk]: int64, ascending; best on CPU, since tiles are planned on the host.
    Returns out [Tq, Hq, D] and the natural log-sum-exp of the scaled scores, lse [Hq, Tq]: fp64 for fp64 inputs, fp32
    for all others. A query that sees no key gets (0, -inf).
    backend: `reference` any device; `cpu_flash` CPU; `auto` cpu_flash on CPU, reference elsewhere (exact on CUDA, and
    slow: PyTorch's CUDA flash kernels round partial results to 16 bits).
    Raises ConfigError for shapes, dtypes, positions or a backend that cannot work.
    """
    pos_q, pos_k = pos_q.cpu().contiguous(), pos_k.cpu().contiguous()
    _validate(q_THD, k_THD, v_THD, pos_q, pos_k)
    attend = BACKENDS[_choose(backend, q_THD.device)]
    if not len(pos_q) or not len(pos_k):
        return empty_state(q_THD)
    return attend(q_THD, k_THD, v_THD, pos_q, pos_k, scale)


def _choose(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return "cpu_flash" if device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r}", f"auto, {', '.join(BACKENDS)}", "pass backend='auto'")
    if backend == "cpu_flash" and device.type != "cpu":
        raise ConfigError(f"backend 'cpu_flash' for tensors on {device}", "tensors on cpu", "pass backend='auto'")
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
