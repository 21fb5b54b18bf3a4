"""The probe's two passes over a rank's keys: few rows, all keys, no table of rows x keys. In plain torch, or in Triton.

    pass 1   row_lse       log-sum-exp of each row's scores        [ q: 64 rows a head ] x [ keys, tile by tile ]
    pass 2   key_masses    p = exp(score - log-sum-exp), summed per key, and per row and class of key

The rows are consecutive positions, so the 64 x K distances to a key lie in at most two bins of 64:

    rows        r0 r1 .. r23 | r24 .. r63           key at distance 40 from r0
    bin             0        |     1                `early` is the mass of the first part, `columns` that of both

The plain passes are the truth, in fp64 too; CUDA devices take the kernels of triton_backend/probe.py.
R rows, K keys, H query heads, G K/V heads with a unit, D head dim; U units, Z slots; N counts by class, C classes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_mm.kernels.merge import state_dtype
from sglang_mm.kernels.problem import capability_of

log = logging.getLogger(__name__)
SCORES = {"cpu": 1 << 20, "cuda": 1 << 24}  # held at once: 4 MiB in fp32, so that caches hold them; 64 MiB
BIN = 64
FIXED_POINT = float(1 << 40)
"""Sums by class are whole multiples of 2^-40: exact, so that their order is free."""

Units = Sequence[tuple[int, ...]]
"""Per unit, the query heads whose masses are summed: of one K/V head, no head twice."""


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Which pairs are counted by class. A count is of one unit, and of pairs with position >= sink of the key and a
    distance >= window, both of one item >= 0.

    row_item [R], key_item [K]: int32, negative where nothing is counted. key_class: int32 [K], outside 0 .. classes - 1
    where nothing is counted. counts: (unit, sink, window), sink >= 0.
    """

    row_item: Tensor
    key_item: Tensor
    key_class: Tensor
    classes: int
    counts: tuple[tuple[int, int, int], ...]


class KeyMasses(NamedTuple):
    """columns, early [U, K]: summed over rows and the unit's heads; early: over the rows of the lower bin of distances.

    by_class: int64 [N, R, C], in units of 2^-40: of each pair's mass, rounded; None where nothing was to be counted.
    """

    columns: Tensor
    early: Tensor
    by_class: Tensor | None


def row_lse(q_RHD: Tensor, k_KGD: Tensor, pos_k: Tensor, rows: range, units: Units, *, scale: float) -> Tensor:
    """[H, R]: natural log-sum-exp of the scaled scores over the keys at or before each row; -inf for none.

    q_RHD [R, H, D], k_KGD [K, G, D]: one dtype and device. rows: positions of the R rows. pos_k: int64 [K], ascending.
    fp64 for fp64 inputs, else fp32. NaN for heads of no unit. Keys after the last row are not read.
    """
    passes = _triton_passes(q_RHD)
    if passes is not None:
        return passes.row_lse(q_RHD, k_KGD, pos_k, rows, units, scale=scale)
    slots = make_slots(units, q_RHD.shape[1] // k_KGD.shape[1], q_RHD)
    lse_ZR = q_RHD.new_full((len(slots), len(rows)), float("-inf"), dtype=state_dtype(q_RHD.dtype))
    for _, scores_ZRK in score_tiles(q_RHD, k_KGD, pos_k, rows, slots, scale=scale):
        lse_ZR = torch.logaddexp(lse_ZR, torch.logsumexp(scores_ZRK, dim=-1))
    lse_HR = lse_ZR.new_full((q_RHD.shape[1], len(rows)), float("nan"))
    lse_HR[slots.heads] = lse_ZR
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
    """What each key gets of p = exp(score - lse). Arguments as for `row_lse`; lse_HR: over all keys of all ranks.

    Masses are in the dtype of lse_HR, and 0 for keys after the last row, which are not read.
    """
    passes = _triton_passes(q_RHD)
    if passes is not None:
        return passes.key_masses(q_RHD, k_KGD, pos_k, rows, units, lse_HR, scale=scale, by_class=by_class)
    slots = make_slots(units, q_RHD.shape[1] // k_KGD.shape[1], q_RHD)
    lse_ZR1 = lse_HR[slots.heads].unsqueeze(-1)
    columns = lse_ZR1.new_zeros(len(units), len(k_KGD))
    early = torch.zeros_like(columns)
    counter = _ClassCounter(by_class, rows, pos_k) if by_class is not None else None
    row_R1 = torch.arange(len(rows), device=pos_k.device)[:, None]
    for keys, scores_ZRK in score_tiles(q_RHD, k_KGD, pos_k, rows, slots, scale=scale):
        p_ZRK = scores_ZRK.sub_(lse_ZR1).exp_()
        columns[:, keys] = slots.per_unit(p_ZRK.sum(1))
        if counter is not None:
            counter.add(slots.per_unit(p_ZRK), keys)
        into_bin_K = (rows.start - pos_k[keys]) % BIN
        early[:, keys] = slots.per_unit(p_ZRK.mul_(row_R1 < BIN - into_bin_K).sum(1))
    return KeyMasses(columns, early, None if counter is None else counter.mass_NRC[..., :-1])


def fixed(mass: Tensor) -> Tensor:
    """int64, in units of 2^-40."""
    return (mass * FIXED_POINT).round_().long()


@dataclass(frozen=True, eq=False)
class Slots:
    """Query heads in a rectangle, so that one batched product serves all K/V heads without copies of K.

    kv_heads int64 [G]; heads int64 [G * N], the query heads of kv_heads[0], of kv_heads[1], ... A K/V head with fewer
    than N repeats one. weights [U, G * N]: 1 where the unit owns the slot, 0 elsewhere, also for repetitions.
    """

    kv_heads: Tensor
    heads: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.heads)

    def arrange(self, x_RHD: Tensor) -> Tensor:
        """[R, H, D] -> [G, N * R, D]."""
        rows, _, dim = x_RHD.shape
        kv_heads = len(self.kv_heads)
        return x_RHD[:, self.heads].transpose(0, 1).reshape(kv_heads, len(self) // kv_heads * rows, dim)

    def per_unit(self, x_ZX: Tensor) -> Tensor:
        """[G * N, ...] -> [U, ...]: the sum over each unit's heads."""
        return (self.weights @ x_ZX.flatten(1)).view(len(self.weights), *x_ZX.shape[1:])


def make_slots(units: Units, group: int, like: Tensor) -> Slots:
    """group: query heads per K/V head. like: of the device, and of the inputs' dtype."""
    by_kv: dict[int, list[tuple[int, int]]] = {}
    for number, heads in enumerate(units):
        by_kv.setdefault(heads[0] // group, []).extend((head, number) for head in heads)
    width = max(map(len, by_kv.values()))
    padded = [pairs + [(pairs[0][0], -1)] * (width - len(pairs)) for _, pairs in sorted(by_kv.items())]
    heads, owner = torch.tensor(padded, device=like.device).flatten(0, 1).T
    weights = owner == torch.arange(len(units), device=like.device)[:, None]
    return Slots(torch.tensor(sorted(by_kv), device=like.device), heads, weights.to(state_dtype(like.dtype)))


def score_tiles(
    q_RHD: Tensor, k_KGD: Tensor, pos_k: Tensor, rows: range, slots: Slots, *, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (keys, scores [Z, R, K]) tile by tile; -inf where a key comes after the row. The caller may write to them.

    Keys after the last row are left out: how many there are is asked of the device.
    """
    dtype = state_dtype(q_RHD.dtype)
    borders = pos_k.new_tensor([rows.start, rows.stop - 1])
    seen_by_all, seen = torch.searchsorted(pos_k, borders, right=True).tolist()
    positions_R1 = torch.arange(rows.start, rows.stop, device=pos_k.device)[:, None]
    q_GXD = slots.arrange(q_RHD).to(dtype) * scale
    tile = max(1, scores_at_once(pos_k.device) // (len(slots) * len(rows)))
    for first in range(0, seen, tile):
        keys = slice(first, min(first + tile, seen))
        k_GDK = k_KGD[keys][:, slots.kv_heads].to(dtype).permute(1, 2, 0)
        scores_ZRK = (q_GXD @ k_GDK).view(len(slots), len(rows), -1)
        if keys.stop > seen_by_all:
            scores_ZRK.masked_fill_(pos_k[keys] > positions_R1, float("-inf"))
        yield keys, scores_ZRK


def scores_at_once(device: torch.device) -> int:
    return SCORES.get(device.type, SCORES["cuda"])


class _ClassCounter:
    """mass_NRC: int64 [N, R, C + 1]; the last column is of keys that are not counted."""

    def __init__(self, by_class: ClassCounts, rows: range, pos_k: Tensor):
        self._by_class, self._pos_k = by_class, pos_k
        self._row_R1 = torch.arange(rows.start, rows.stop, device=pos_k.device)[:, None]
        left_out = list(dict.fromkeys(count[1:] for count in by_class.counts))
        order = [(count[0], left_out.index(count[1:])) for count in by_class.counts]
        self._unit_N, self._left_out_N = torch.tensor(order, device=pos_k.device).T
        self._sink, self._window = torch.tensor(left_out, device=pos_k.device).T[:, :, None, None]
        self.mass_NRC = pos_k.new_zeros(len(order), len(rows), by_class.classes + 1)

    def add(self, p_URK: Tensor, keys: slice) -> None:
        item_R1, item_K = self._by_class.row_item[:, None], self._by_class.key_item[keys]
        class_K, classes = self._by_class.key_class[keys].long(), self._by_class.classes
        class_K = class_K.where((class_K >= 0) & (class_K < classes), classes)
        pos_K = self._pos_k[keys]
        in_item_RK = (item_R1 >= 0) & (item_R1 == item_K)
        left_out_XRK = (self._row_R1 - pos_K < self._window) | (pos_K < self._sink) | ~in_item_RK
        mass_NRK = fixed(p_URK[self._unit_N].masked_fill_(left_out_XRK[self._left_out_N], 0))
        self.mass_NRC.scatter_add_(2, class_K.expand_as(mass_NRK), mass_NRK)


def _triton_passes(q_RHD: Tensor):
    """The kernels, or None where plain torch computes: on CPU, and with a line in the log for what they cannot."""
    if q_RHD.device.type == "cpu":
        return None
    from sglang_mm.kernels.triton_backend import probe as passes

    reason = passes.unfit(q_RHD, capability_of(q_RHD.device))
    if reason is not None:
        _say_once(reason)
        return None
    return passes


@lru_cache
def _say_once(reason: str) -> None:
    log.warning("the probe is computed in plain torch: %s", reason)
