"""Dense causal attention, by whatever is installed: the best of these is what sparse attention is compared with.

q [S, Hq, D], k and v [S, Hkv, D]; one prompt, all rows. S tokens, Hq query heads, Hkv K/V heads, D head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_suite.oracle import allowed, errors, exact
from benchmarks.gpu_suite.report import GREEN, RED, UNFIT, Check
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.spot import Sample, check_rows
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import Qkv, random_qkv
from benchmarks.gpu_suite.timing import LONG_S, Timing, measure, once
from benchmarks.gpu_suite.work import attention_flops, dense_pairs

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
CHECKED = 777
"""Tokens: no multiple of any tile."""
CONTENDERS = 2
"""Beyond the shortest length only the fastest ones of the length before are timed, and of long runs the fastest."""


class Absent(Exception):
    """Why a baseline cannot run here."""


def baselines(device: torch.device) -> dict[str, Callable[[], Attend]]:
    """By name, what makes each; it raises Absent, or ImportError, where it cannot run."""
    if device.type != "cuda":
        return {"SDPA": lambda: _sdpa(None)}
    return {
        "SDPA cuDNN": lambda: _sdpa("CUDNN_ATTENTION"),
        "SDPA cuDNN, K/V repeated": lambda: _sdpa("CUDNN_ATTENTION", is_repeated=True),
        "SDPA flash": lambda: _sdpa("FLASH_ATTENTION"),
        "FA3": _fa3,
        "FA3 of SGLang": _fa3_of_sglang,
        "FA4": _fa4,
        "FlashInfer": _flashinfer,
    }


def check_dense(suite: Suite) -> None:
    """Note those that are there and right, on a small prompt."""
    sizes, device = suite.sizes, suite.device
    heads, kv_heads = sizes.points[0].heads, sizes.points[0].kv_heads
    qkv = random_qkv(CHECKED, heads, kv_heads, sizes.head_dim, sizes.dtype, device, seed=11)
    scale = sizes.head_dim**-0.5
    causal = torch.ones(CHECKED, CHECKED, dtype=torch.bool, device=device).tril().expand(heads, -1, -1)
    want = exact(*qkv, causal, scale)
    limit = allowed(*qkv, causal, scale, want, merges=0)[0]
    for name, make in baselines(device).items():
        if name in suite.lost:
            continue
        what, backend = f"causal, {CHECKED} tokens", f"dense {name}"
        try:
            with suite.trying(name):
                error = errors((make()(*qkv, scale), want[1]), want)[0]
        except (Absent, ImportError) as why:
            suite.report.checks.append(Check(what, backend, UNFIT, why=str(why)))
            continue
        except Exception as why:  # any: a baseline that fails here is not compared with, and that is said
            suite.report.checks.append(Check(what, backend, UNFIT, why=f"{type(why).__name__}: {str(why)[:200]}"))
            continue
        is_right = error <= limit
        why = "" if is_right else f"out error {error:.2e} > {limit:.2e}"
        suite.report.checks.append(Check(what, backend, GREEN if is_right else RED, (error,), (limit,), why))
        if is_right:
            suite.baselines += (name,)


def time_dense(suite: Suite, point: Point, qkv: Qkv, sample: Sample) -> None:
    """Into suite.dense. A baseline that fails at this length, or is wrong in the sampled rows, is passed over."""
    order, most = suite.by_speed(point), contenders(suite, point)
    found: dict[str, Timing] = {}
    for name in order:
        if len(found) == most:
            break
        what = f"dense {name} at {point.name}"
        try:
            with suite.trying(name):
                timing = _time_baseline(suite, name, what, qkv, sample)
        except Exception as why:  # any: out of memory, or a length that the library does not take
            suite.budget.skip(what, f"{type(why).__name__}: {str(why)[:200]}")
            continue
        if timing is not None:
            found[name] = timing
            flops = attention_flops(dense_pairs(point.tokens, point.heads), suite.sizes.head_dim)
            rate = {"TFLOP/s": flops / timing.median / 1e12}
            suite.report.add("dense", {"point": point.name, "baseline": name}, timing, **rate)
    if found:
        suite.dense[point] = found


def contenders(suite: Suite, point: Point) -> int:
    """How many baselines are timed there."""
    if not suite.dense:
        return len(suite.baselines)
    return CONTENDERS if suite.expected(point) < LONG_S else 1


def _time_baseline(suite: Suite, name: str, what: str, qkv: Qkv, sample: Sample) -> Timing | None:
    """The run that is checked is the first one of the warm-up. None for a wrong result."""
    attend, scale, results = baselines(suite.device)[name](), suite.sizes.head_dim**-0.5, []
    first_s = once(lambda: results.append(attend(*qkv, scale)), suite.device)
    check = check_rows(what, f"dense {name}", qkv[0].dtype, (results.pop(), None), sample)
    if check.status == RED:
        suite.budget.skip(what, check.why)
        return None
    return measure(lambda: attend(*qkv, scale), suite.device, suite.sizes.repeat_s, before=first_s)


def _sdpa(backend: str | None, is_repeated: bool = False) -> Attend:
    """backend: a name of torch's SDPBackend; None: whichever it takes. is_repeated: where it takes no groups."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, scale):
        if is_repeated:
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def _fa3() -> Attend:
    from flash_attn_interface import flash_attn_func

    return _batched(flash_attn_func)


def _fa3_of_sglang() -> Attend:
    if torch.cuda.get_device_capability()[0] != 9:
        raise Absent("it is for sm_90")
    from sglang.kernels.ops.attention.flash_attention_v3 import flash_attn_varlen_func

    def attend(q, k, v, scale):
        ends = torch.arange(2, dtype=torch.int32, device=q.device) * len(q)
        return flash_attn_varlen_func(q, k, v, ends, ends, len(q), len(q), softmax_scale=scale, causal=True)

    return attend


def _fa4() -> Attend:
    from flash_attn.cute import flash_attn_func

    return _batched(flash_attn_func)


def _batched(function) -> Attend:
    def attend(q, k, v, scale):
        found = function(q[None], k[None], v[None], softmax_scale=scale, causal=True)
        return (found[0] if isinstance(found, tuple) else found)[0]

    return attend


def _flashinfer() -> Attend:
    from flashinfer import single_prefill_with_kv_cache

    return lambda q, k, v, scale: single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=scale)
