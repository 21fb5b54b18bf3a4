"""The kernels beside those for programs: the merge of partial results, the probe's two passes, and attention over keys
in pages, against plain torch in fp64.

R rows, K keys, Hq query heads, Hkv K/V heads, U units, D head dim.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_suite.oracle import FP32
from benchmarks.gpu_suite.paged_decode import NAME as PAGED
from benchmarks.gpu_suite.paged_decode import pool_slots, requests_ptr, shuffled_pages
from benchmarks.gpu_suite.report import GREEN, RED, Check
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import poison, random_qkv
from sglang_mm.kernels import join_partials, merge, paged_attention, probe
from sglang_mm.kernels.probe import FIXED_POINT, ClassCounts
from sglang_mm.types import Residence

ROWS, KEYS = 61, 1003
"""No multiples of any tile."""


def check_small_kernels(suite: Suite) -> None:
    sizes = suite.sizes
    for name, errors in (("merge", _merge_error), ("probe", _probe_errors), (PAGED, _paged_errors)):
        if name in suite.lost:
            continue
        for dtype in sizes.check_dtypes:
            is_main = sizes.check_all or dtype == sizes.dtype
            for head_dim in sizes.check_dims if is_main else sizes.check_dims[-1:]:
                what = f"heads of {head_dim}, {str(dtype).removeprefix('torch.')}"
                with suite.trying(name):
                    suite.report.checks.append(_tried(suite, what, name, partial(errors, suite, dtype, head_dim)))


def _tried(suite: Suite, what: str, name: str, run: Callable[[], tuple[Iterable[float], Iterable[float]]]) -> Check:
    try:
        error, allowed = map(tuple, run())
    except Exception as why:  # any: the other kernels are still to be checked
        suite.check_device(why)
        return Check(what, name, RED, why=f"{type(why).__name__}: {str(why)[:400]}")
    is_right = all(one <= limit for one, limit in zip(error, allowed))
    return Check(what, name, GREEN if is_right else RED, error, allowed, "" if is_right else f"{error} > {allowed}")


def _merge_error(suite: Suite, dtype: torch.dtype, head_dim: int):
    """Two products and a sum in fp32 of values up to v, and a log-sum-exp up to l: 4 roundings of each."""
    out, _, out_i = random_qkv(ROWS, 6, 6, head_dim, torch.float32, suite.device, seed=1)
    lse, lse_i = 4 * random_qkv(6, ROWS, ROWS, 2, torch.float32, suite.device, seed=2)[0].permute(2, 0, 1)
    lse[:, ::3], lse_i[:, ::4] = float("-inf"), float("-inf")
    out[::3], out_i = 0, out_i.to(dtype)
    out_i[::4] = 0
    want = [each.double() for each in (out, lse)]
    merge(*want, out_i.double(), lse_i.double())
    got = out.clone(), lse.clone()
    merge(*got, out_i, lse_i)
    return _differences(got, want), [4 * FP32 * _largest(each) for each in want]


def _probe_errors(suite: Suite, dtype: torch.dtype, head_dim: int):
    """Of log-sum-exp, columns, early and sums by class. Allowed: twice the error of the same passes in fp32 on the CPU,
    and one rounding of the largest score, which moves a log-sum-exp by as much and masses by that factor."""
    q, k, _ = random_qkv(KEYS, 8, 2, head_dim, dtype, suite.device, seed=3)
    rows = range(KEYS - ROWS, KEYS)
    q = q[rows.start :]
    poison(suite.device)
    got = _passes(q, k, rows)
    want = _passes(q.double().cpu(), k.double().cpu(), rows)
    plain = _passes(q.float().cpu(), k.float().cpu(), rows)
    score = FP32 * head_dim**-0.5 * float(q.double().norm(dim=-1).max()) * float(k.double().norm(dim=-1).max())
    limits = [
        2 * error + score * (1 if n == 0 else _largest(wanted))
        for n, (error, wanted) in enumerate(zip(_differences(plain, want), want))
    ]
    return _differences(got, want), limits


def _passes(q: Tensor, k: Tensor, rows: range) -> list[Tensor]:
    """Heads 0 and 1 share a unit; head 2 is alone, as are two of the other K/V head; the others have none."""
    units = [(0, 1), (2,), (4,), (7,)]
    device, scale = q.device, q.shape[2] ** -0.5
    positions = torch.arange(KEYS, device=device)
    item = (positions // 300).int()
    counts = ClassCounts(item[rows.start :], item, (positions % 17 - 1).int(), 16, ((0, 0, 1), (2, 8, 70)))
    lse = probe.row_lse(q, k, positions, rows, units, scale=scale)
    masses = probe.key_masses(q, k, positions, rows, units, lse, scale=scale, by_class=counts)
    return [lse[[0, 1, 2, 4, 7]], masses.columns, masses.early, masses.by_class.double() / FIXED_POINT]


def _paged_errors(suite: Suite, dtype: torch.dtype, head_dim: int):
    """Of rank 1 of 3: one row a request, and some; and of the two joined, as results of two ranks would be.

    Allowed: weights are rounded to the dtype of v, by half an eps each; scores, sums and exponentials are of fp32.
    """
    table = shuffled_pages([KEYS, 66, 0, 23], Residence(3, 1, 66), suite.device)
    counts = [ROWS, 1, 2, 0]
    q, k, v = random_qkv(pool_slots(table), 7, 1, head_dim, dtype, suite.device, seed=4)
    scale, ptr = head_dim**-0.5, requests_ptr(counts, suite.device)

    def results(q: Tensor, k: Tensor, v: Tensor, backend: str) -> list[Tensor]:
        several = paged_attention(q[: sum(counts)], k, v, table, scale=scale, queries_ptr=ptr, backend=backend)
        single = paged_attention(q[: len(counts)], k, v, table, scale=scale, backend=backend)
        outs = torch.stack([several[0][: len(counts)], single[0]])
        lses = torch.stack([several[1][:, : len(counts)], single[1]])
        return [*several, *single, *join_partials(outs, lses)]

    poison(suite.device)
    got = results(q, k, v, "auto" if suite.is_rehearsal else "triton")
    want = results(q.double(), k.double(), v.double(), "reference")
    score = scale * float(q.double().norm(dim=-1).max()) * float(k.double().norm(dim=-1).max())
    fp32 = 8 * FP32 * (1 + score)
    rounded = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    limits = [(fp32 + rounded) * float(v.abs().max()), fp32 * max(1.0, _largest(want[1]))] * 3
    return _differences(got, want), limits


def _differences(got: Iterable[Tensor], want: Iterable[Tensor]) -> list[float]:
    """Largest difference of each pair, infinite where one has NaN, or is infinite where the other is not."""
    pairs = [(one.cpu().double(), other.cpu().double()) for one, other in zip(got, want)]
    return [_largest(one - other) if _alike(one, other) else float("inf") for one, other in pairs]


def _alike(one: Tensor, other: Tensor) -> bool:
    return not bool(one.isnan().any()) and torch.equal(one.isinf(), other.isinf())


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
