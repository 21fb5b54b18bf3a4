"""The attention kernel: one instance computes a work, that is a tile of rows for one head over some of its visits.

    Q: rows gathered   [ full visits: no mask | partial visits: bounds and bits ]   O, LSE: merged into the rows' state
                         K, V: BN rows of the packed copy per visit

A visit is a step of BN keys inside an entry. Entries are walked in one flat loop, and the next one is looked up an
iteration ahead, so that loads of K and V are pipelined over the borders of entries, however short these are.

M rows of a tile, N keys of a visit, D head dim; E: D rounded up to a power of two. Scores and softmax in fp32.
"""

import torch
import triton
import triton.language as tl

from sglang_mm.kernels.triton_backend.configs import JOIN_ROWS, JOIN_WARPS, TILE, choose_config, padded
from sglang_mm.kernels.triton_backend.variant import ARCHS, Variant

LN2 = tl.constexpr(0.6931471805599453)
NO_POSITION = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["heads", "lse_head"])
def attend_kernel(
    Q, K, V, OUT, LSE, SLOT_OUT, SLOT_LSE,
    POS_Q, POS_K, ROWS, ROW_PTR, ITEM_UNIT, ITEM_ROWS, UNIT_HEADS,
    WORK_ITEM, WORK_SLOT, WORK_FULL, WORK_PART,
    FULL_KEY, FULL_STOP, FULL_END,
    PART_KEY, PART_STOP, PART_END, PART_BOUNDS, PART_LIVE, BOUNDS, LIVE,
    q_row, q_head, kv_key, kv_head, out_row, lse_head, scale_log2, heads,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SUBTILES: tl.constexpr,
    TMA: tl.constexpr, LSE_ONLY: tl.constexpr,
):  # fmt: skip
    """Tables as `works.py` makes them. heads: the most of any unit. SUBTILES: parts of BM rows of a tile.

    K, V: pointers to [N, Hkv, D], or with TMA descriptors of it, of blocks [BN, 1, E]. scale_log2: scale * log2(e).
    """
    place = tl.program_id(0) % (heads * SUBTILES)
    work = tl.program_id(0) // (heads * SUBTILES)
    item = tl.load(WORK_ITEM + work)
    if item < 0:
        return
    head = tl.load(UNIT_HEADS + tl.load(ITEM_UNIT + item) * heads + place // SUBTILES)
    if head < 0:
        return
    row, is_row = _rows(ROWS, ROW_PTR, tl.load(ITEM_ROWS + item), place % SUBTILES * BM + tl.arange(0, BM))
    d = tl.arange(0, E)
    in_head = is_row[:, None] & (d < D)[None, :]
    q = tl.load(Q + row[:, None] * q_row + head.to(tl.int64) * q_head + d[None, :], mask=in_head, other=0.0)
    pos_q = tl.load(POS_Q + row, mask=is_row, other=0).to(tl.int32)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    top, total, acc = _full_visits(
        q, K, V, top, total, acc, WORK_FULL + 4 * work, FULL_KEY, FULL_STOP, FULL_END,
        head // GROUP, kv_key, kv_head, scale_log2, D, E, BN, TMA, LSE_ONLY,
    )  # fmt: skip
    top, total, acc = _partial_visits(
        q, K, V, top, total, acc, WORK_PART + 4 * work, PART_KEY, PART_STOP, PART_END,
        PART_BOUNDS, PART_LIVE, BOUNDS, LIVE, pos_q, POS_K,
        head // GROUP, kv_key, kv_head, scale_log2, D, E, BN, TMA, LSE_ONLY,
    )  # fmt: skip

    has_keys = is_row & (total != 0)  # true for NaN, which must not look like a row without keys
    total = tl.where(has_keys, total, 1.0)
    lse = tl.where(has_keys, (top + tl.log2(total)) * LN2, float("-inf"))
    acc = acc / total[:, None]
    slot = tl.load(WORK_SLOT + work)
    if slot >= 0:
        row_of_slot = (slot * SUBTILES + place) * BM + tl.arange(0, BM)
        tl.store(SLOT_LSE + row_of_slot, lse)
        if not LSE_ONLY:
            tl.store(SLOT_OUT + row_of_slot[:, None] * E + d[None, :], acc)
    else:
        _merge_rows(acc, lse, OUT + head * D, LSE + head * lse_head, row, out_row, has_keys, d, D, LSE_ONLY)


@triton.jit
def _full_visits(
    q, K, V, top, total, acc, WORK, KEY, STOP, END, head, kv_key, kv_head, scale_log2,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, LSE_ONLY: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    entry, begin = tl.load(WORK), tl.load(WORK + 3)
    key, stop, end = tl.load(KEY + entry), tl.load(STOP + entry), tl.load(END + entry)
    for visit in tl.range(tl.load(WORK + 1), tl.load(WORK + 2)):
        first = key + (visit - begin) * BN
        k = _load(K, first, stop, head, kv_key, kv_head, n, D, E, BN, TMA)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if stop - first < BN:  # the last keys of an entry: rare, so not worth a select in every visit
            s = tl.where((n < stop - first)[None, :], s, float("-inf"))
        p, keep, top, total = _softmax(s, scale_log2, top, total)
        if not LSE_ONLY:
            v = _load(V, first, stop, head, kv_key, kv_head, n, D, E, BN, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        begin = tl.where(visit + 1 >= end, visit + 1, begin)
        entry += (visit + 1 >= end).to(tl.int32)
        key, stop, end = tl.load(KEY + entry), tl.load(STOP + entry), tl.load(END + entry)
    return top, total, acc


@triton.jit
def _partial_visits(
    q, K, V, top, total, acc, WORK, KEY, STOP, END, PART_BOUNDS, PART_LIVE, BOUNDS, LIVE, pos_q, POS_K,
    head, kv_key, kv_head, scale_log2,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr,
    TMA: tl.constexpr, LSE_ONLY: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    entry, begin = tl.load(WORK), tl.load(WORK + 3)
    key, stop, end = tl.load(KEY + entry), tl.load(STOP + entry), tl.load(END + entry)
    low, high, k_low, k_high = _bounds(BOUNDS, PART_BOUNDS, entry)
    live = tl.load(PART_LIVE + entry)
    for visit in tl.range(tl.load(WORK + 1), tl.load(WORK + 2)):
        first = key + (visit - begin) * BN
        k = _load(K, first, stop, head, kv_key, kv_head, n, D, E, BN, TMA)
        pos_k = tl.load(POS_K + first + n, mask=first + n < stop, other=NO_POSITION)
        shown = (pos_k >= k_low) & (pos_k < k_high) & _is_live(LIVE, live, first - key + n)
        distance = pos_q[:, None] - pos_k[None, :]
        visible = shown[None, :] & (distance >= low) & (distance < high)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(visible, s, float("-inf"))
        p, keep, top, total = _softmax(s, scale_log2, top, total)
        if not LSE_ONLY:
            v = _load(V, first, stop, head, kv_key, kv_head, n, D, E, BN, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        begin = tl.where(visit + 1 >= end, visit + 1, begin)
        entry += (visit + 1 >= end).to(tl.int32)
        key, stop, end = tl.load(KEY + entry), tl.load(STOP + entry), tl.load(END + entry)
        low, high, k_low, k_high = _bounds(BOUNDS, PART_BOUNDS, entry)
        live = tl.load(PART_LIVE + entry)
    return top, total, acc


@triton.jit
def _rows(ROWS, ROW_PTR, tile, m):
    """(int64 [BM] rows at places m of a tile of rows, which of these there are)."""
    at = tl.load(ROW_PTR + tile) + m
    is_row = at < tl.load(ROW_PTR + tile + 1)
    return tl.load(ROWS + at, mask=is_row, other=0).to(tl.int64), is_row


@triton.jit
def _load(
    X, first, stop, head, kv_key, kv_head, n,
    D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BN, E] of one head; zeros beyond D, and without TMA beyond `stop`."""
    if TMA:
        x = X.load([first, head, 0]).reshape([BN, E])
    else:
        d = tl.arange(0, E)
        mask = (first + n < stop)[:, None]
        if D < E:
            mask = mask & (d < D)[None, :]
        x = tl.load(X + head * kv_head + (first + n).to(tl.int64)[:, None] * kv_key + d[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def _softmax(s, scale_log2, top, total):
    """One step of the online softmax in powers of two: (p, what earlier sums are multiplied by, top, total)."""
    new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: -inf - -inf would be NaN
    p = tl.exp2(s * scale_log2 - shift[:, None])
    keep = tl.exp2(top - shift)
    return p, keep, new_top, total * keep + tl.sum(p, 1)


@triton.jit
def _bounds(BOUNDS, PART_BOUNDS, entry):
    at = BOUNDS + tl.load(PART_BOUNDS + entry) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _is_live(LIVE, live, bit):
    word = tl.load(LIVE + live * 2 + bit // 64, mask=(live >= 0) & (bit < 128), other=-1)
    return (word >> (bit % 64).to(tl.int64)) & 1 != 0


@triton.jit
def _shares(lse, lse_i):
    """(share of the one, share of the other, log-sum-exp of both), as kernels.merge has them; no NaN from two -inf."""
    top = tl.maximum(lse, lse_i)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight, weight_i = tl.exp(lse - shift), tl.exp(lse_i - shift)
    total = weight + weight_i
    share = 1 / tl.maximum(total, 1.0)
    return weight * share, weight_i * share, shift + tl.log(total)


@triton.jit
def _merge_rows(acc, lse, OUT, LSE, row, out_row, mask, d, D: tl.constexpr, LSE_ONLY: tl.constexpr):
    """Merge into the state of these rows, as kernels.merge does. Rows that were empty are not read before."""
    before = tl.load(LSE + row, mask=mask, other=float("-inf"))
    old, new, joined = _shares(before, lse)
    if not LSE_ONLY:
        at = OUT + row[:, None] * out_row + d[None, :]
        mask_MD = mask[:, None] & (d < D)[None, :]
        was = tl.load(at, mask=mask_MD & (before != float("-inf"))[:, None], other=0.0)
        tl.store(at, was * old[:, None] + acc * new[:, None], mask=mask_MD)
    tl.store(LSE + row, joined, mask=mask)


@triton.jit(do_not_specialize=["heads", "lse_head"])
def join_kernel(
    OUT, LSE, SLOT_OUT, SLOT_LSE, ROWS, ROW_PTR, ITEM_UNIT, ITEM_ROWS, UNIT_HEADS, SPLIT_ITEM, SPLIT_SLOTS,
    out_row, lse_head, heads,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, SUBTILES: tl.constexpr,
    LSE_ONLY: tl.constexpr,
):  # fmt: skip
    """The parts of one split item for one head, joined in order and merged into the rows' state."""
    place = tl.program_id(0) % (heads * SUBTILES)
    split = tl.program_id(0) // (heads * SUBTILES)
    item = tl.load(SPLIT_ITEM + split)
    if item < 0:
        return
    head = tl.load(UNIT_HEADS + tl.load(ITEM_UNIT + item) * heads + place // SUBTILES)
    if head < 0:
        return
    m, d = tl.arange(0, BM), tl.arange(0, E)
    row, is_row = _rows(ROWS, ROW_PTR, tl.load(ITEM_ROWS + item), place % SUBTILES * BM + m)
    lse = tl.full([BM], float("-inf"), tl.float32)
    acc = tl.zeros([BM, E], tl.float32)
    step = tl.load(SPLIT_SLOTS + split * 3 + 2)
    for slot in range(tl.load(SPLIT_SLOTS + split * 3), tl.load(SPLIT_SLOTS + split * 3 + 1), step):
        part = (slot * SUBTILES + place) * BM + m
        lse_part = tl.load(SLOT_LSE + part)
        old, new, joined = _shares(lse, lse_part)
        if not LSE_ONLY:
            was = tl.load(SLOT_OUT + part[:, None] * E + d[None, :])
            acc = acc * old[:, None] + was * new[:, None]
        lse = joined
    has_keys = is_row & (lse != float("-inf"))
    _merge_rows(acc, lse, OUT + head * D, LSE + head * lse_head, row, out_row, has_keys, d, D, LSE_ONLY)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT64 = ("POS_Q", "ROW_PTR", "LIVE")
FP32 = ("OUT", "LSE", "SLOT_OUT", "SLOT_LSE")


def variants() -> list[Variant]:
    """Every configuration for the head dims that models have: dtypes and archs, with and without values."""
    shapes = [(dim, dtype, only) for dim in (64, 80, 96, 128) for dtype in DTYPES for only in (False, True)]
    return [_attend_variant(*shape, arch) for shape in shapes for arch in ARCHS] + [_join_variant()]


def _attend_variant(dim: int, dtype: str, lse_only: bool, arch: int) -> Variant:
    config = choose_config(arch, DTYPES[dtype], dim)
    keys = f"tensordesc<{dtype}[{config.keys}, 1, {padded(dim)}]>" if config.tma else f"*{dtype}"
    constexprs = {
        "GROUP": 7, "D": dim, "E": padded(dim), "BM": config.rows, "BN": config.keys,
        "SUBTILES": TILE // config.rows, "TMA": config.tma, "LSE_ONLY": lse_only,
    }  # fmt: skip
    return Variant(
        name=f"{'lse' if lse_only else 'attend'}-{dim}-{dtype}-sm_{arch}",
        fn=attend_kernel,
        signature=_signature(attend_kernel, constexprs, {"Q": f"*{dtype}", "K": keys, "V": keys}),
        constexprs=constexprs,
        divisible=_divisible(attend_kernel, constexprs, ("K", "V") if config.tma else ()),
        num_warps=config.warps,
        num_stages=config.stages,
        archs=(arch,),
        wgmma=dtype != "fp32",
        tma=config.tma,
        cp_async=not config.tma and config.stages > 1,
    )


def _join_variant() -> Variant:
    constexprs = {
        "D": 128, "E": 128, "BM": JOIN_ROWS, "SUBTILES": TILE // JOIN_ROWS, "LSE_ONLY": False
    }  # fmt: skip
    signature, divisible = _signature(join_kernel, constexprs, {}), _divisible(join_kernel, constexprs, ())
    return Variant("join-128", join_kernel, signature, constexprs, divisible, JOIN_WARPS, num_stages=3)


def _signature(kernel, constexprs: dict, known: dict[str, str]) -> dict[str, str]:
    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name.isupper():
            return known.get(name) or ("*i64" if name in INT64 else "*fp32" if name in FP32 else "*i32")
        return "fp32" if name == "scale_log2" else "i32"

    return {name: type_of(name) for name in kernel.arg_names}


def _divisible(kernel, constexprs: dict, descriptors: tuple[str, ...]) -> tuple[str, ...]:
    """All addresses and strides; lse_head is the number of rows, on which nothing is specialised."""
    left_out = {*constexprs, *descriptors, "scale_log2", "lse_head", "heads"}
    return tuple(name for name in kernel.arg_names if name not in left_out)
