"""The probe's two passes in Triton: the kernels, launched by `probe.py`.

    row_lse        one instance: 64 rows of PER heads of one K/V head, resident, over SPLIT keys in steps of BN
    key_masses     the same; sums over the rows of each head
    class_masses   one instance: BN keys of one K/V head, resident, over the heads of its units with counts

Floats are never added by atomics, so that results do not depend on what runs first. Keys after the last row are not
read. M = PER * R rows of a block of heads, N = BN keys, R = 64 probe rows (what lies beyond the real ones is zero), D
head dim; E: D rounded up to a power of two. Scores and sums in fp32, powers of two instead of e.
"""

import triton
import triton.language as tl

BIN = tl.constexpr(64)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.0e38)
NO_POSITION = tl.constexpr(2**31 - 1)
FIXED_POINT = tl.constexpr(float(1 << 40))
WHOLE_FROM = tl.constexpr(float(1 << 23))
"""From here an fp32 is a whole number."""


@triton.jit(do_not_specialize=["blocks", "keys", "first", "rows"])
def row_lse_kernel(
    Q, K, POS_K, KV_HEADS, OUT, blocks, keys, first, rows, k_key, k_head, scale_log2,
    D: tl.constexpr, E: tl.constexpr, R: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT fp32 [parts, blocks * PER * R]."""
    block = tl.program_id(0) % blocks  # blocks of one K/V head run at a time, and find its keys in the cache
    part = tl.program_id(0) // blocks
    begin = part * SPLIT
    whole, seen = _borders(POS_K, begin, keys, first, rows, R, SPLIT, BN)
    m = tl.arange(0, PER * R)
    q = _queries(Q, block, PER * R, E)
    K += tl.load(KV_HEADS + block).to(tl.int64) * k_head
    top = tl.full([PER * R], float("-inf"), tl.float32)
    total = tl.zeros([PER * R], tl.float32)
    for n in tl.range(begin, seen, BN):
        k = _keys(K, n, seen, k_key, D, E, BN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if n >= whole:
            ahead = _ahead(POS_K, n, seen, first, BN)
            s = tl.where(ahead[None, :] <= (m % R)[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = _finite(new_top)
        total = total * tl.exp2(_finite(top) - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = new_top
    lse = (_finite(top) + tl.log2(total)) * LN2
    tl.store(OUT + (part.to(tl.int64) * blocks + block) * PER * R + m, lse)


@triton.jit
def _finite(x):
    """Differences of these are never NaN."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit(do_not_specialize=["blocks", "keys", "first", "rows"])
def key_masses_kernel(
    Q, K, POS_K, KV_HEADS, LSE, COLUMNS, EARLY, blocks, keys, first, rows, k_key, k_head, scale_log2,
    D: tl.constexpr, E: tl.constexpr, R: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """LSE fp32 [blocks * PER, R]. COLUMNS, EARLY fp32 [blocks * PER, keys]."""
    block = tl.program_id(0) % blocks
    begin = tl.program_id(0) // blocks * SPLIT
    whole, seen = _borders(POS_K, begin, keys, first, rows, R, SPLIT, BN)
    m = tl.arange(0, PER * R)
    q = _queries(Q, block, PER * R, E)
    lse_log2 = tl.load(LSE + block * PER * R + m) * LOG2E
    K += tl.load(KV_HEADS + block).to(tl.int64) * k_head
    for n in tl.range(begin, seen, BN):
        k = _keys(K, n, seen, k_key, D, E, BN)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        ahead = _ahead(POS_K, n, seen, first, BN)
        if n >= whole:
            s = tl.where((ahead[:, None] <= (m % R)[None, :]) & (m % R < rows)[None, :], s, float("-inf"))
        p = tl.exp2(s - lse_log2[None, :])
        _store_sums(p, COLUMNS, EARLY, block, n, seen, keys, ahead, R, PER, BN)


@triton.jit
def _store_sums(
    p, COLUMNS, EARLY, block, n, seen, keys, ahead,
    R: tl.constexpr, PER: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """p [BN, PER * R], summed over the rows of each head."""
    last_early = (ahead - 1) & (BIN - 1)  # distances up to there are in the bin of row 0
    is_early = tl.arange(0, R)[None, :] <= last_early[:, None]
    p = tl.reshape(p, [BN, PER, R])
    key = n + tl.arange(0, BN)[:, None]
    at = (block * PER + tl.arange(0, PER))[None, :].to(tl.int64) * keys + key
    tl.store(COLUMNS + at, tl.sum(p, 2), mask=key < seen)
    tl.store(EARLY + at, tl.sum(p * is_early[:, None, :].to(tl.float32), 2), mask=key < seen)  # a product: NaN stays


@triton.jit
def _borders(POS_K, begin, keys, first, rows, R: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr):
    """Of a part's keys: up to where steps need no mask, and up to where the last row sees them."""
    n = begin + tl.arange(0, SPLIT)
    ahead = tl.load(POS_K + n, mask=n < keys, other=NO_POSITION) - first
    seen = tl.sum((ahead < rows).to(tl.int32))
    seen_by_all = tl.where(rows == R, tl.sum((ahead <= 0).to(tl.int32)), 0)
    return begin + seen_by_all // BN * BN, begin + seen


@triton.jit
def _ahead(POS_K, n, seen, first, BN: tl.constexpr):
    """int32 [BN]: how far each key is after row 0."""
    n = n + tl.arange(0, BN)
    return (tl.load(POS_K + n, mask=n < seen, other=NO_POSITION) - first).to(tl.int32)


@triton.jit
def _queries(Q, block, M: tl.constexpr, E: tl.constexpr):
    return tl.load(Q + (block * M + tl.arange(0, M)).to(tl.int64)[:, None] * E + tl.arange(0, E)[None, :])


@triton.jit
def _keys(K, n, stop, k_key, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr):
    """[BN, E]; zeros beyond D, and from `stop` on."""
    n = n + tl.arange(0, BN)
    d = tl.arange(0, E)
    mask = (n < stop)[:, None]
    if D < E:
        mask = mask & (d < D)[None, :]
    return tl.load(K + n.to(tl.int64)[:, None] * k_key + d[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["kv_heads", "keys", "first", "rows", "classes"])
def class_masses_kernel(
    Q, K, POS_K, KV_HEADS, LSE, UNIT_PTR, SLOT_PTR, ROW_ITEM, KEY_ITEM, KEY_CLASS, COUNT_PTR, COUNTS, BY_CLASS,
    kv_heads, keys, first, rows, classes, k_key, k_head, scale_log2,
    D: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of units in order of K/V heads: UNIT_PTR int32 [kv_heads + 1], SLOT_PTR and COUNT_PTR [units + 1]; COUNTS int32
    [N, 3]: number, sink, window. LSE fp32 [slots, R]. BY_CLASS int64 [N, rows, classes]."""
    place = tl.program_id(0) % kv_heads
    n0 = tl.program_id(0) // kv_heads * BN
    n, r = n0 + tl.arange(0, BN), tl.arange(0, R)
    ahead = _ahead(POS_K, n0, keys, first, BN)
    klass = tl.load(KEY_CLASS + n, mask=ahead < rows, other=-1)
    item = tl.load(KEY_ITEM + n, mask=ahead < rows, other=-1)
    row_item = tl.load(ROW_ITEM + r, mask=r < rows, other=-2)
    is_counted = ((item >= 0) & (klass >= 0) & (klass < classes))[:, None] & (item[:, None] == row_item[None, :])
    read = tl.sum((ahead < rows).to(tl.int32))
    if tl.max(tl.max(is_counted.to(tl.int32), 1), 0) == 0:
        return
    k = _keys(K + tl.load(KV_HEADS + place).to(tl.int64) * k_head, n0, n0 + read, k_key, D, E, BN)
    for u in tl.range(tl.load(UNIT_PTR + place), tl.load(UNIT_PTR + place + 1)):
        p = tl.zeros([BN, R], tl.float32)
        for slot in tl.range(tl.load(SLOT_PTR + u), tl.load(SLOT_PTR + u + 1)):
            q = _queries(Q, slot, R, E)
            lse_log2 = tl.load(LSE + slot * R + r) * LOG2E
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
            p += tl.exp2(tl.where(ahead[:, None] <= r[None, :], s, float("-inf")) - lse_log2[None, :])
        for c in tl.range(tl.load(COUNT_PTR + u), tl.load(COUNT_PTR + u + 1)):
            sink, window = tl.load(COUNTS + 3 * c + 1), tl.load(COUNTS + 3 * c + 2)
            adds = is_counted & (ahead >= sink - first)[:, None] & (r[None, :] - ahead[:, None] >= window)
            table = BY_CLASS + tl.load(COUNTS + 3 * c).to(tl.int64) * rows * classes
            tl.atomic_add(table + (r[None, :] * classes + klass[:, None]), _fixed(p), mask=adds, sem="relaxed")


@triton.jit
def _fixed(p):
    """int64, in units of 2^-40, rounded half to even: to add 2^23 to an fp32 below it does that."""
    x = p * FIXED_POINT
    return tl.where(x < WHOLE_FROM, (x + WHOLE_FROM) - WHOLE_FROM, x).to(tl.int64)
