"""Two small kernels in configurations that must pass, and in some that must not: the checks of machine code can fail.

C[M, N] = A[M, steps * K] B[steps * K, N].
"""

import triton
import triton.language as tl

from sglang_mm.kernels.triton_backend.variant import Variant


@triton.jit
def by_pointers(A, B, C, row, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(A + m[:, None] * row + step * K + k[None, :])
        b = tl.load(B + (step * K + k)[:, None] * row + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + m[:, None] * row + n[None, :], total)


@triton.jit
def by_descriptors(A, B, C, row, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    total = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        total = tl.dot(A.load([0, step * K]), B.load([step * K, 0]), total)
    tl.store(C + tl.arange(0, M)[:, None] * row + tl.arange(0, N)[None, :], total)


POINTERS = Variant(
    name="pointers",
    fn=by_pointers,
    signature={"A": "*bf16", "B": "*bf16", "C": "*fp32", "row": "i32", "steps": "i32"}
    | dict.fromkeys("MNK", "constexpr"),
    constexprs={"M": 64, "N": 64, "K": 64},
    divisible=("A", "B", "C", "row"),
    num_warps=4,
    num_stages=3,
    archs=(90,),
    wgmma=True,
    cp_async=True,
)
DESCRIPTORS = POINTERS._replace(
    name="descriptors",
    fn=by_descriptors,
    signature=POINTERS.signature | dict.fromkeys("AB", "tensordesc<bf16[64, 64]>"),
    divisible=("C", "row"),
    archs=(80, 90, 100, 120),
    tma=True,
    cp_async=False,
)
REFUSED = POINTERS._replace(name="refused", signature=POINTERS.signature | {"A": "*fp8e4nv"}, archs=(80,))


def variants() -> list[Variant]:
    return [
        POINTERS,
        DESCRIPTORS,
        POINTERS._replace(name="large", constexprs={"M": 128, "N": 256, "K": 16}),
        POINTERS._replace(name="deep", num_stages=8, archs=(89, 90)),
        POINTERS._replace(name="not divisible", divisible=()),
        POINTERS._replace(name="half a warpgroup", num_warps=2),
        POINTERS._replace(name="no descriptors", tma=True),
    ]
