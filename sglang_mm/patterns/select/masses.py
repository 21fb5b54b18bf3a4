"""Pass 2: how much attention the probe gives to each key, to each distance, and to each difference of classes.

The probe's rows are consecutive and at most 64, so the 64 x K distances to a key lie in at most two bins of 64:

    rows        r0 r1 .. r23 | r24 .. r63           key j at distance 40 from r0
    bin             0        |     1                `early` is the mass of the first part, `columns` that of both

so that two numbers per key hold the masses of columns, of classes, and of distances, for any choice of keys.
U units, W wants, R probe rows, K keys of this rank, Z slots as in probe.py, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Grid, Pattern
from sglang_mm.patterns.select.held import Heads, Held, make_slots
from sglang_mm.patterns.select.probe import Probe, score_tiles
from sglang_mm.types import Axis, Modality

BIN = 64
FIXED_POINT = float(1 << 40)
"""Masses are whole multiples of 2^-40 in sums over classes, distances and ranks: exact, so their order is free."""


@dataclass(frozen=True)
class Want:
    """A choice to be made: for unit number `unit`, `pattern` against keys of a modality (None: all)."""

    unit: int
    keys: Modality | None
    pattern: Pattern


@dataclass(frozen=True, eq=False)
class Masses:
    """columns, early [U, K]: per key of this rank, summed over rows and the unit's heads. early: rows of the lower bin.

    shifts: int64 [C] for grids with class differences, per axis, of this rank's keys, in fixed point: mass by
    starts[name space] + class difference, between places of one item, beyond the grid's sink and window.
    """

    probe: Probe
    columns: Tensor
    early: Tensor
    shifts: dict[tuple[Want, Axis], Tensor]


def fixed(mass: Tensor) -> Tensor:
    """int64, in units of 2^-40."""
    return (mass * FIXED_POINT).round_().long()


def measure_masses(held: Held, probe: Probe, units: Sequence[Heads], wants: Sequence[Want]) -> Masses:
    """One pass over this rank's keys. wants: those of class differences say which are measured."""
    slots = make_slots(units, held)
    lse_ZR1 = probe.lse_HR[slots.heads].unsqueeze(-1)
    columns = lse_ZR1.new_zeros(len(units), len(held.k_KGD))
    early = torch.zeros_like(columns)
    counters = _shift_counters(held, probe, wants)
    row_R1 = torch.arange(len(probe.rows), device=held.device)[:, None]
    for keys, scores_ZRK in score_tiles(held, probe.q_RHD, probe.rows, slots):
        p_ZRK = scores_ZRK.sub_(lse_ZR1).exp_()
        columns[:, keys] = slots.per_unit(p_ZRK.sum(1))
        if counters:
            p_URK = slots.per_unit(p_ZRK)
            for counter in counters:
                counter.add(p_URK, held.pos_k[keys])
        into_bin_K = (probe.rows.start - held.pos_k[keys]) % BIN
        early[:, keys] = slots.per_unit(p_ZRK.mul_(row_R1 < BIN - into_bin_K).sum(1))
    shifts = {(want, each.axis): mass_C for each in counters for want, mass_C in zip(each.wants, each.mass_WC)}
    return Masses(probe, columns, early, shifts)


class _ShiftCounter:
    """Mass by difference of classes along one axis, for each of W wants."""

    def __init__(self, axis: Axis, held: Held, probe: Probe, wants: Sequence[Want]):
        self.axis, self.wants = axis, wants
        self._classes, self._item = held.tokens.classes(axis), held.tokens.item
        self._rows_R1 = probe.positions[:, None]
        numbers = [(want.unit, want.pattern.sink, want.pattern.window) for want in wants]
        self._unit_W, sink_W, window_W = torch.tensor(numbers, device=held.device).T
        self._sink, self._window = sink_W.view(-1, 1, 1), window_W.view(-1, 1, 1)
        self.mass_WC = torch.zeros(len(wants), len(self._classes), dtype=torch.int64, device=held.device)

    def add(self, p_URK: Tensor, pos_K: Tensor) -> None:
        row_R1, key_K = self._classes.of_token[self._rows_R1].long(), self._classes.of_token[pos_K].long()
        in_item_RK = (row_R1 >= 0) & (key_K >= 0) & (self._item[self._rows_R1] == self._item[pos_K])
        unseen_WRK = (self._rows_R1 - pos_K >= self._window) & (pos_K >= self._sink) & in_item_RK
        mass_WX = fixed(p_URK[self._unit_W] * unseen_WRK).flatten(1)
        starts = torch.tensor(self._classes.starts, device=pos_K.device)
        space_R1 = self._classes.spaces.to(pos_K.device)[row_R1.clamp(min=0)]
        difference_RK = (row_R1 - key_K) % (starts[space_R1 + 1] - starts[space_R1])
        index_X = (starts[space_R1] + difference_RK).flatten()
        self.mass_WC.scatter_add_(1, index_X.expand(len(mass_WX), -1), mass_WX)


def _shift_counters(held: Held, probe: Probe, wants: Sequence[Want]) -> list[_ShiftCounter]:
    """One per axis that a grid with class differences may take; none where no probe row is a place of a frame."""
    grids = [want for want in wants if isinstance(want.pattern, Grid) and want.pattern.slash]
    if not grids or not bool((held.tokens.place[probe.rows.start : probe.rows.stop] >= 0).any()):
        return []
    by_axis = {axis: [want for want in grids if want.pattern.axis in (axis, "auto")] for axis in Axis}
    return [_ShiftCounter(axis, held, probe, chosen) for axis, chosen in by_axis.items() if chosen]
