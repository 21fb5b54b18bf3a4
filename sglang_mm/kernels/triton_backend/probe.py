"""The probe's two passes in Triton, as kernels/probe.py defines them: what the kernels are launched with.

Nothing here waits for the device. A pass cuts the keys into parts of 1024, whatever their number and the device, so
that the order of additions is always the same. R probe rows, K keys, H query heads, G K/V heads, D head dim; U units,
P parts, Z slots: heads in blocks of one K/V head each.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sglang_mm.kernels.probe import ClassCounts, KeyMasses, Units
from sglang_mm.kernels.triton_backend.probe_kernels import (
    LOG2E,
    class_masses_kernel,
    key_masses_kernel,
    row_lse_kernel,
)
from sglang_mm.kernels.triton_backend.variant import Variant

ROWS = 64
SPLIT = 1024
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LARGEST_DIM = 128


class _Config(NamedTuple):
    """per: heads of a block; keys: of a step. Chosen by what the compiler makes of them: no spills on any arch, and two
    instances or more on a processor of sm_80 and sm_90. Times are still to be measured."""

    per: int
    keys: int
    warps: int
    stages: int


ONE_HEAD, TWO_HEADS, FP32 = _Config(1, 64, 4, 3), _Config(2, 64, 8, 3), _Config(1, 32, 8, 2)
BY_CLASS = _Config(1, 32, 8, 2)


class _Inputs(NamedTuple):
    q_RHD: Tensor
    k_KGD: Tensor
    pos_k: Tensor
    rows: range
    scale: float

    @property
    def group(self) -> int:
        return self.q_RHD.shape[1] // self.k_KGD.shape[1]


def unfit(q_RHD: Tensor, capability: int) -> str | None:
    """None where the kernels take these probe rows, else one line why not. capability: 90 for sm_90."""
    rows, _, dim = q_RHD.shape
    if capability < 80:
        return f"{q_RHD.device} has capability {capability}, the kernels need 80"
    if q_RHD.dtype not in DTYPES:
        return f"{q_RHD.dtype}, the kernels take {', '.join(map(str, DTYPES))}"
    if dim > LARGEST_DIM:
        return f"head dim {dim}, the kernels take up to {LARGEST_DIM}"
    return f"{rows} rows, the kernels take up to {ROWS}" if rows > ROWS else None


def row_lse(q_RHD: Tensor, k_KGD: Tensor, pos_k: Tensor, rows: range, units: Units, *, scale: float) -> Tensor:
    """As `kernels.probe.row_lse`, for what `unfit` lets through."""
    inputs = _Inputs(q_RHD, k_KGD, pos_k, rows, scale)
    blocks, config = _make_blocks(inputs, units)
    part_PZR = q_RHD.new_empty(triton.cdiv(len(k_KGD), SPLIT), len(blocks.heads), ROWS, dtype=torch.float32)
    _launch(row_lse_kernel, inputs, blocks, config, part_PZR)
    lse_HR = part_PZR.new_full((q_RHD.shape[1], len(rows)), float("nan"))
    lse_HR[blocks.heads] = torch.logsumexp(part_PZR, dim=0)[:, : len(rows)]
    return lse_HR


def key_masses(
    q_RHD: Tensor,
    k_KGD: Tensor,
    pos_k: Tensor,
    rows: range,
    units: Units,
    lse_HR: Tensor,
    *,
    scale: float,
    by_class: ClassCounts | None = None,
) -> KeyMasses:
    """As `kernels.probe.key_masses`, for what `unfit` lets through. A NaN stays in the units of its head."""
    inputs = _Inputs(q_RHD, k_KGD, pos_k, rows, scale)
    blocks, config = _make_blocks(inputs, units)
    columns_ZK, early_ZK = lse_HR.new_zeros(2, len(blocks.heads), len(k_KGD))
    _launch(key_masses_kernel, inputs, blocks, config, _slots_of(lse_HR, blocks.heads), columns_ZK, early_ZK)
    counted = None if by_class is None else _count_classes(inputs, units, lse_HR, by_class)
    return KeyMasses(blocks.per_unit(columns_ZK), blocks.per_unit(early_ZK), counted)


class _Blocks(NamedTuple):
    """heads int64 [Z]: the query heads of blocks, of one K/V head each; the last block of a K/V head may repeat one.

    kv_heads int32 [blocks]. sums: what `per_unit` adds, in order: units and their slots, int64, the first of all units.
    """

    heads: Tensor
    kv_heads: Tensor
    sums: tuple[tuple[Tensor, Tensor], ...]

    def per_unit(self, x_ZK: Tensor) -> Tensor:
        """[U, K]: the sum over each unit's heads."""
        total = x_ZK[self.sums[0][1]]
        for units, slots in self.sums[1:]:
            total[units] += x_ZK[slots]
        return total


def _make_blocks(inputs: _Inputs, units: Units) -> tuple[_Blocks, _Config]:
    most = max(map(len, _by_kv_head(units, inputs.group).values()))
    config = FP32 if inputs.q_RHD.dtype == torch.float32 else TWO_HEADS if most > 1 else ONE_HEAD
    return _blocks(tuple(map(tuple, units)), inputs.group, config.per, inputs.q_RHD.device), config


@lru_cache(maxsize=64)  # layers ask alike, and a copy from the host would wait for the device
def _blocks(units: tuple[tuple[int, ...], ...], group: int, per: int, device: torch.device) -> _Blocks:
    slots, kv_heads = [], []
    for kv_head, numbers in _by_kv_head(units, group).items():
        heads = [head for number in numbers for head in units[number]]
        heads += heads[:1] * (-len(heads) % per)
        slots += heads
        kv_heads += [kv_head] * (len(heads) // per)
    sums = []
    for place in range(max(map(len, units))):
        have = [number for number, heads in enumerate(units) if len(heads) > place]
        sums.append((_table(have, device), _table([slots.index(units[number][place]) for number in have], device)))
    return _Blocks(_table(slots, device), _table(kv_heads, device).int(), tuple(sums))


def _by_kv_head(units: Units, group: int) -> dict[int, list[int]]:
    """K/V heads, ascending, with the numbers of their units."""
    numbers: dict[int, list[int]] = {}
    for number, heads in enumerate(units):
        numbers.setdefault(heads[0] // group, []).append(number)
    return dict(sorted(numbers.items()))


def _table(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _launch(kernel, inputs: _Inputs, blocks: _Blocks, config: _Config, *tables: Tensor) -> None:
    q_RHD, k_KGD, pos_k, rows, scale = inputs
    keys, dim, count = len(k_KGD), q_RHD.shape[2], len(blocks.kv_heads)
    if not keys:
        return
    k_KGD = k_KGD if k_KGD.stride(2) == 1 else k_KGD.contiguous()
    with torch.cuda.device_of(q_RHD):
        kernel[(count * triton.cdiv(keys, SPLIT),)](
            _queries(q_RHD, blocks.heads), k_KGD, pos_k, blocks.kv_heads, *tables,
            count, keys, rows.start, len(rows), k_KGD.stride(0), k_KGD.stride(1), scale * LOG2E.value,
            D=dim, E=_padded(dim), R=ROWS, PER=config.per, SPLIT=SPLIT, BN=config.keys,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _queries(q_RHD: Tensor, heads_Z: Tensor) -> Tensor:
    """[Z, 64, D rounded up]: the slots' queries, with zeros around them."""
    rows, _, dim = q_RHD.shape
    q_ZRD = q_RHD.new_zeros(len(heads_Z), ROWS, _padded(dim))
    q_ZRD[:, :rows, :dim] = q_RHD[:, heads_Z].transpose(0, 1)
    return q_ZRD


def _slots_of(lse_HR: Tensor, heads_Z: Tensor) -> Tensor:
    """[Z, 64]."""
    return torch.nn.functional.pad(lse_HR[heads_Z], (0, ROWS - lse_HR.shape[1]))


class _Counts(NamedTuple):
    """Of the units with counts, in order of K/V heads: heads int64 [Z], kv_heads int32 [G].

    unit_ptr int32 [G + 1], slot_ptr and count_ptr int32 [units + 1]; counts int32 [N, 3]: number, sink, window.
    """

    heads: Tensor
    kv_heads: Tensor
    unit_ptr: Tensor
    slot_ptr: Tensor
    count_ptr: Tensor
    counts: Tensor


@lru_cache(maxsize=64)
def _make_counts(
    units: tuple[tuple[int, ...], ...], counts: tuple[tuple[int, int, int], ...], group: int, device: torch.device
) -> _Counts:
    of_unit: dict[int, list[tuple[int, int, int]]] = {}
    for number, (unit, sink, window) in enumerate(counts):
        of_unit.setdefault(unit, []).append((number, sink, window))
    by_kv = {kv: [n for n in numbers if n in of_unit] for kv, numbers in _by_kv_head(units, group).items()}
    by_kv = {kv: numbers for kv, numbers in by_kv.items() if numbers}
    order = [number for numbers in by_kv.values() for number in numbers]

    def ptr(sizes) -> Tensor:
        return torch.nn.functional.pad(_table(list(sizes), device).cumsum(0), (1, 0)).int()

    return _Counts(
        heads=_table([head for number in order for head in units[number]], device),
        kv_heads=_table(list(by_kv), device).int(),
        unit_ptr=ptr(map(len, by_kv.values())),
        slot_ptr=ptr(len(units[number]) for number in order),
        count_ptr=ptr(len(of_unit[number]) for number in order),
        counts=_table([each for number in order for each in of_unit[number]], device).int(),
    )


def _count_classes(inputs: _Inputs, units: Units, lse_HR: Tensor, by_class: ClassCounts) -> Tensor:
    """int64 [N, R, C]."""
    q_RHD, k_KGD, pos_k, rows, scale = inputs
    keys, dim = len(k_KGD), q_RHD.shape[2]
    table = _make_counts(tuple(map(tuple, units)), by_class.counts, inputs.group, q_RHD.device)
    mass_NRC = pos_k.new_zeros(len(by_class.counts), len(rows), by_class.classes)
    if not keys or not mass_NRC.numel():
        return mass_NRC
    k_KGD = k_KGD if k_KGD.stride(2) == 1 else k_KGD.contiguous()
    with torch.cuda.device_of(q_RHD):
        class_masses_kernel[(len(table.kv_heads) * triton.cdiv(keys, BY_CLASS.keys),)](
            _queries(q_RHD, table.heads), k_KGD, pos_k, table.kv_heads, _slots_of(lse_HR, table.heads),
            table.unit_ptr, table.slot_ptr, by_class.row_item, by_class.key_item, by_class.key_class,
            table.count_ptr, table.counts, mass_NRC,
            len(table.kv_heads), keys, rows.start, len(rows), by_class.classes,
            k_KGD.stride(0), k_KGD.stride(1), scale * LOG2E.value,
            D=dim, E=_padded(dim), R=ROWS, BN=BY_CLASS.keys,
            num_warps=BY_CLASS.warps, num_stages=BY_CLASS.stages,
        )  # fmt: skip
    return mass_NRC


def variants() -> list[Variant]:
    """Every configuration of the kernels. Of the head dims that are rounded up one, and of 16-bit floats bf16: others
    differ in a constant, or in the name of an instruction."""
    shapes = [(dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 80, 128)] + [("fp16", 128)]
    return [variant for dtype, dim in shapes for variant in _variants(dtype, dim)]


def _variants(dtype: str, dim: int) -> list[Variant]:
    configs = (FP32,) if dtype == "fp32" else (ONE_HEAD, TWO_HEADS)
    passes = [(kernel, config) for config in configs for kernel in (row_lse_kernel, key_masses_kernel)]
    return [_variant(*each, dtype, dim) for each in (*passes, (class_masses_kernel, BY_CLASS))]


TYPES = {"POS_K": "*i64", "BY_CLASS": "*i64", "scale_log2": "fp32"} | dict.fromkeys(
    ("LSE", "OUT", "COLUMNS", "EARLY"), "*fp32"
)


def _variant(kernel, config: _Config, dtype: str, dim: int) -> Variant:
    constants = {"D": dim, "E": _padded(dim), "R": ROWS, "PER": config.per, "SPLIT": SPLIT, "BN": config.keys}
    types = TYPES | {"Q": f"*{dtype}", "K": f"*{dtype}"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32" if name.isupper() else "i32") for name in kernel.arg_names}
    pointers = tuple(name for name, of_type in signature.items() if of_type.startswith("*"))
    name = kernel.__name__.removesuffix("_kernel")
    return Variant(
        name=f"{name}-{dim}-{dtype}-x{config.per}",
        fn=kernel,
        signature=signature,
        constexprs={each: constants[each] for each, of_type in signature.items() if of_type == "constexpr"},
        divisible=(*pointers, "k_key", "k_head"),
        num_warps=config.warps,
        num_stages=config.stages,
        wgmma=kernel is not class_masses_kernel and dtype != "fp32",
        cp_async=True,
    )
