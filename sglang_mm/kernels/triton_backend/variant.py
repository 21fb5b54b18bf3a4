"""What is shipped of a Triton kernel: one configuration that is compiled, with what its machine code must contain.

Each Triton module exports `variants() -> list[Variant]`, every configuration that its launcher can choose. The tests
compile all of them for all their architectures on a machine without a GPU.
"""

from typing import Any, NamedTuple

ARCHS = (80, 89, 90, 100, 120)
"""A100, L40S, H100/H200, B200, RTX 50: each has shared memory or matrix instructions of its own."""


class Variant(NamedTuple):
    """One compiled configuration of one kernel.

    name: unique within the module; kernel, head dim, dtype and what else there is, as in "attend-128-bf16".
    fn: the @triton.jit function.
    signature: every parameter's type, in order: "*bf16", "*fp32", "*i64", "i32", "fp32", "constexpr".
    constexprs: the value of each "constexpr" parameter.
    divisible: arguments (pointers in bytes, integers as they are) that are multiples of 16, as the launcher sees to it.
    Without them loads are scalar, and neither cp.async nor TMA can appear.
    archs: 90 for sm_90. wgmma: sm_90 must multiply by warpgroups. tma: sm_90 and later must load by TMA.
    cp_async: pointer loads must be pipelined through shared memory.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS
    wgmma: bool = False
    tma: bool = False
    cp_async: bool = False
