"""Attention of a few query rows over the keys of their requests that this rank keeps, where they rest in its pool.

    one instance: a tile of query rows of one request, all heads of a K/V head, over one part of the kept keys
    page ids in logical slots -> rows of K, V in the pool -> OUT, LSE of the part;  parts are joined in order

How many parts there are depends on shapes alone; which keys a part has follows from the lengths, on the device. So a
launch waits for nothing, and one that was captured in a CUDA graph is right for later lengths.

T query rows, Hq query heads, Hkv K/V heads, B requests, P parts, N keys of a step, D head dim; E: D rounded up to a
power of two. M rows of an instance: some query rows of PER heads each, those of a K/V head rounded up likewise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_mm.kernels.merge import empty_state
from sglang_mm.kernels.problem import Problem, capability_of
from sglang_mm.kernels.triton_backend import launch
from sglang_mm.kernels.triton_backend.configs import LARGEST_GROUP, choose_paged_config, padded
from sglang_mm.kernels.triton_backend.merge import join_parts
from sglang_mm.kernels.triton_backend.variant import ARCHS, Variant

LN2 = tl.constexpr(0.6931471805599453)
INSTANCES = 2
"""Instances per processor, about: enough loads under way for the memory, few parts to join."""
SHORTEST = 256
"""Keys of a part, at least, where the context is full."""


def unfit(problem: Problem) -> str | None:
    """Why the kernel cannot run here; None where it can."""
    why = launch.unfit(problem)
    group = problem.heads // problem.kv_heads
    if why is None and group > LARGEST_GROUP:
        return f"takes up to {LARGEST_GROUP} query heads per K/V head, not {group}"
    return why


def attend(q_THD: Tensor, k_pool: Tensor, v_pool: Tensor, table, queries_ptr: Tensor | None, scale: float):
    """See `kernels.paged.paged_attention`: (out, lse). Never waits for the device; shapes follow from shapes."""
    if not len(q_THD):
        return empty_state(q_THD)
    with torch.cuda.device_of(q_THD):  # Triton launches on the current device
        out_PTHD, lse_PHT = _launch(q_THD, k_pool, v_pool, table, queries_ptr, scale)
        return (out_PTHD[0], lse_PHT[0]) if len(out_PTHD) == 1 else join_parts(out_PTHD, lse_PHT)


def _launch(q_THD, k_pool, v_pool, table, queries_ptr: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    (rows, heads, dim), kv_heads, requests = q_THD.shape, k_pool.shape[1], len(table.lengths)
    is_single, residence = queries_ptr is None, table.residence
    config = choose_paged_config(capability_of(q_THD.device), q_THD.dtype, is_single)
    per = triton.next_power_of_2(heads // kv_heads)
    step = 1 if is_single else config.rows // per
    tiles = rows if is_single else rows // step + min(requests, rows)
    parts = count_parts(tiles * kv_heads, residence.held(table.slots.shape[1]), launch._processors(q_THD.device))
    out_PTHD = q_THD.new_empty(parts, rows, heads, dim, dtype=torch.float32)
    lse_PHT = q_THD.new_empty(parts, heads, rows, dtype=torch.float32)
    q_THD, k_pool, v_pool = (each if each.stride(2) == 1 else each.contiguous() for each in (q_THD, k_pool, v_pool))
    paged_kernel[(tiles * kv_heads * parts,)](
        q_THD, k_pool, v_pool, out_PTHD, lse_PHT,
        table.slots, table.rows, table.lengths, table.lengths if is_single else queries_ptr,
        rows, requests, tiles, kv_heads, parts, residence.rank * residence.share, table.slots.stride(0),
        q_THD.stride(0), q_THD.stride(1), k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
        scale * launch.LOG2_E,
        GROUP=heads // kv_heads, PER=per, STEP=step, D=dim, E=padded(dim), BM=config.rows, BN=config.keys,
        SHARE=residence.share, PAGE=residence.page,
        REQUESTS=0 if is_single else max(16, triton.next_power_of_2(requests)),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out_PTHD, lse_PHT


def count_parts(instances: int, keys: int, processors: int) -> int:
    """Into how many parts the keys are cut. instances: of a part; keys: that this rank keeps of a full context."""
    return max(1, min(triton.cdiv(INSTANCES * processors, instances), triton.cdiv(keys, SHORTEST)))


@triton.jit(do_not_specialize=["rows", "requests", "tiles", "kv_heads", "parts", "offset", "slots_row"])
def paged_kernel(
    Q, K, V, OUT, LSE, SLOTS, ROWS, LENGTHS, QUERIES_PTR,
    rows, requests, tiles, kv_heads, parts, offset, slots_row,
    q_row, q_head, k_slot, k_head, v_slot, v_head, scale_log2,
    GROUP: tl.constexpr, PER: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SHARE: tl.constexpr, PAGE: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [P, T, Hq, D], LSE fp32 [P, Hq, T], contiguous. offset: of the first kept token in each page.

    Tiles of one part and K/V head run at a time, and find its keys in the cache. REQUESTS: 0 where each request has one
    query row, else B rounded up to a power of two.
    """
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    part = tl.program_id(0) // tiles // kv_heads
    request, first, stop = _rows_of(QUERIES_PTR, tile, requests, STEP, REQUESTS)
    if request >= requests:
        return
    m, d = tl.arange(0, BM), tl.arange(0, E)
    row, head = (first + m // PER).to(tl.int64), kv_head * GROUP + m % PER
    is_row = (row < stop) & (m // PER < STEP) & (m % PER < GROUP)
    in_head = is_row[:, None] & (d < D)[None, :]
    q = tl.load(Q + row[:, None] * q_row + head[:, None] * q_head + d[None, :], mask=in_head, other=0.0)
    SLOTS += tl.load(ROWS + request).to(tl.int64) * slots_row + offset
    begin, end = _keys_of(tl.load(LENGTHS + request).to(tl.int32), part, parts, offset, SHARE, PAGE, BN)
    K += kv_head * k_head
    V += kv_head * v_head

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    for n in tl.range(begin, end, BN):
        key = n + tl.arange(0, BN)
        is_key = key < end
        slot = tl.load(SLOTS + key // SHARE * PAGE, mask=is_key, other=0)  # of the first kept token of the page
        at = (slot // PAGE).to(tl.int64) * SHARE + key % SHARE
        k = _load(K, at, k_slot, is_key, d, D, E)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        s = tl.where(is_key[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p, keep = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)  # every step has a key: new_top is finite
        v = _load(V, at, v_slot, is_key, d, D, E)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        top = new_top

    has_keys = total != 0  # true for NaN, which must not look like a part without keys
    total = tl.where(has_keys, total, 1.0)
    of_part = (part * rows).to(tl.int64) * kv_heads * GROUP
    tl.store(LSE + of_part + head * rows + row, tl.where(has_keys, (top + tl.log2(total)) * LN2, top), mask=is_row)
    out = OUT + (of_part + row * kv_heads * GROUP + head)[:, None] * D + d[None, :]
    tl.store(out, acc / total[:, None], mask=in_head)


@triton.jit
def _rows_of(QUERIES_PTR, tile, requests, STEP: tl.constexpr, REQUESTS: tl.constexpr):
    """(the request of a tile, or one that does not exist; its first query row; one past the last of the request)."""
    if REQUESTS == 0:
        request, first, stop = tile, tile, tile + 1
    else:
        n = tl.arange(0, REQUESTS)
        begins = tl.load(QUERIES_PTR + n, mask=n < requests, other=0).to(tl.int32)
        stops = tl.load(QUERIES_PTR + n + 1, mask=n < requests, other=0).to(tl.int32)
        tiles = (stops - begins + STEP - 1) // STEP
        ends = tl.cumsum(tiles, 0)
        request = tl.sum((ends <= tile).to(tl.int32))
        is_it = n == request
        first = tl.sum(tl.where(is_it, begins + (tile - ends + tiles) * STEP, 0))
        stop = tl.sum(tl.where(is_it, stops, 0))
    return request, first, stop


@triton.jit
def _keys_of(
    length, part, parts, offset,
    SHARE: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[begin, end) of a part, among the kept keys, as `Residence.held` counts them. Parts are whole steps."""
    kept = length // PAGE * SHARE + tl.minimum(tl.maximum(length % PAGE - offset, 0), SHARE)
    steps = (kept + BN - 1) // BN
    each = (steps + parts - 1) // parts * BN
    return part * each, tl.minimum(part * each + each, kept)


@triton.jit
def _load(X, at, x_slot, is_key, d, D: tl.constexpr, E: tl.constexpr):
    """[N, E]; zeros beyond D, and where there is no key."""
    mask = is_key[:, None]
    if D < E:
        mask = mask & (d < D)[None, :]
    return tl.load(X + at[:, None] * x_slot + d[None, :], mask=mask, other=0.0)


def variants() -> list[Variant]:
    """One query row per request, and several; 28 heads and 4 K/V heads, pages of 64 over 4 ranks."""
    shapes = [(dim, dtype, single) for dim in (64, 80, 128) for dtype in TYPES for single in (True, False)]
    return [_variant(*shape, arch) for shape in shapes for arch in ARCHS]


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _variant(dim: int, dtype: str, is_single: bool, arch: int) -> Variant:
    config = choose_paged_config(arch, TYPES[dtype], is_single)
    constexprs = {
        "GROUP": 7, "PER": 8, "STEP": 1 if is_single else config.rows // 8, "D": dim, "E": padded(dim),
        "BM": config.rows, "BN": config.keys, "SHARE": 16, "PAGE": 64, "REQUESTS": 0 if is_single else 16,
    }  # fmt: skip
    of_pointer = dict.fromkeys("QKV", f"*{dtype}") | dict.fromkeys(("OUT", "LSE"), "*fp32") | {"SLOTS": "*i32"}
    known = of_pointer | dict.fromkeys(constexprs, "constexpr") | {"scale_log2": "fp32"}
    signature = {name: known.get(name, "*i64" if name.isupper() else "i32") for name in paged_kernel.arg_names}
    strides = ("q_row", "q_head", "k_slot", "k_head", "v_slot", "v_head")
    return Variant(
        name=f"paged-{dim}-{dtype}-{'single' if is_single else 'several'}-sm_{arch}",
        fn=paged_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(*(name for name, of_type in signature.items() if of_type.startswith("*")), *strides),
        num_warps=config.warps,
        num_stages=config.stages,
        archs=(arch,),
        wgmma=dtype != "fp32" and config.rows >= 64,
        cp_async=config.stages > 1,
    )
