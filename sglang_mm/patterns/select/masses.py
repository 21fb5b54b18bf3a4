"""Pass 2: how much attention the probe gives to each key, to each distance, and to each difference of classes.

The probe's rows are consecutive and at most 64, so the 64 x K distances to a key lie in at most two bins of 64:

    rows        r0 r1 .. r23 | r24 .. r63           key j at distance 40 from r0
    bin             0        |     1                `early` is the mass of the first part, `columns` that of both

so that two numbers per key hold the masses of columns, of classes, and of distances, for any choice of keys.
U units, R probe rows, K keys of this rank, Z slots as in probe.py, C classes.
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
    counter = _shift_counter(held, probe, wants)
    row_R1 = torch.arange(len(probe.rows), device=held.device)[:, None]
    for keys, scores_ZRK in score_tiles(held, probe.q_RHD, probe.rows, slots):
        p_ZRK = scores_ZRK.sub_(lse_ZR1).exp_()
        columns[:, keys] = slots.per_unit(p_ZRK.sum(1))
        if counter:
            counter.add(slots.per_unit(p_ZRK), held.pos_k[keys])
        into_bin_K = (probe.rows.start - held.pos_k[keys]) % BIN
        early[:, keys] = slots.per_unit(p_ZRK.mul_(row_R1 < BIN - into_bin_K).sum(1))
    return Masses(probe, columns, early, counter.shifts() if counter else {})


class _ShiftCounter:
    """Mass by probe row and class of the key, for each of N different choices of pairs: int64 [N, R, C + 1].

    C: the frame axis' classes in the name spaces of the probe's rows; the last column is of keys that have none of
    these. A column's class along the row axis follows from that along the frame axis. A row's differences are its
    columns turned by its own class, so that this is done once for each row, and not for each key.
    """

    def __init__(self, held: Held, probe: Probe, wants: Sequence[Want]):
        self._wants, self._tokens, self._rows = wants, held.tokens, probe.positions
        frame = held.tokens.classes(Axis.FRAME)
        spaces_C = frame.spaces.to(held.device)
        row_R = frame.of_token[self._rows].long()
        is_near_C = torch.isin(spaces_C, spaces_C[row_R[row_R >= 0]])
        self._near = is_near_C.nonzero().flatten()
        columns_C = torch.where(is_near_C, is_near_C.cumsum(0) - 1, len(self._near))
        self._column_of = torch.nn.functional.pad(columns_C, (0, 1), value=len(self._near))  # its end is for class -1
        self._numbers = {number: place for place, number in enumerate(dict.fromkeys(map(_pairs_of, wants)))}
        left_out = list(dict.fromkeys(number[1:] for number in self._numbers))
        order = [(number[0], left_out.index(number[1:])) for number in self._numbers]
        self._unit_N, self._left_out_N = torch.tensor(order, device=held.device).T
        self._sink, self._window = torch.tensor(left_out, device=held.device).T[:, :, None, None]
        self._mass_NRC = row_R.new_zeros(len(order), len(row_R), len(self._near) + 1)

    def add(self, p_URK: Tensor, pos_K: Tensor) -> None:
        row_R1 = self._rows[:, None]
        in_item_RK = (self._tokens.place[row_R1] >= 0) & (self._tokens.item[row_R1] == self._tokens.item[pos_K])
        left_out_XRK = (row_R1 - pos_K < self._window) | (pos_K < self._sink) | ~in_item_RK
        mass_NRK = fixed(p_URK[self._unit_N].masked_fill_(left_out_XRK[self._left_out_N], 0))
        column_K = self._column_of[self._tokens.classes(Axis.FRAME).of_token[pos_K].long()]
        self._mass_NRC.scatter_add_(2, column_K.expand_as(mass_NRK), mass_NRK)

    def shifts(self) -> dict[tuple[Want, Axis], Tensor]:
        by_axis = {axis: self._by_difference(axis) for axis in Axis}
        return {
            (want, axis): by_axis[axis][self._numbers[_pairs_of(want)]]
            for want in self._wants
            for axis in Axis
            if want.pattern.axis in (axis, "auto")
        }

    def _by_difference(self, axis: Axis) -> Tensor:
        """int64 [N, classes along the axis]."""
        classes = self._tokens.classes(axis)
        starts = torch.tensor(classes.starts, device=self._rows.device)
        row_R1 = classes.of_token[self._rows].long().clamp(min=0)[:, None]  # one off the grid has no mass
        space_R1 = classes.spaces.to(self._rows.device)[row_R1]
        difference_RC = (row_R1 - self._near_along(axis)) % (starts[space_R1 + 1] - starts[space_R1])
        index_X = (starts[space_R1] + difference_RC).flatten()
        mass_NX = self._mass_NRC[..., :-1].flatten(1)
        return mass_NX.new_zeros(len(mass_NX), len(classes)).scatter_add_(1, index_X.expand_as(mass_NX), mass_NX)

    def _near_along(self, axis: Axis) -> Tensor:
        """int64 [C]: the columns' classes along the axis."""
        frame_S, class_S = (self._tokens.classes(each).of_token for each in (Axis.FRAME, axis))
        is_place_S = frame_S >= 0
        class_of = class_S.new_zeros(len(self._tokens.classes(Axis.FRAME)))
        class_of[frame_S[is_place_S].long()] = class_S[is_place_S]
        return class_of[self._near].long()


def _pairs_of(want: Want) -> tuple[int, int, int]:
    """What decides which pairs of places a want counts."""
    return want.unit, want.pattern.sink, want.pattern.window


def _shift_counter(held: Held, probe: Probe, wants: Sequence[Want]) -> _ShiftCounter | None:
    """None where no grid takes class differences, or no probe row is a place of a frame."""
    grids = [want for want in wants if isinstance(want.pattern, Grid) and want.pattern.slash]
    has_places = bool((held.tokens.place[probe.rows.start : probe.rows.stop] >= 0).any())
    return _ShiftCounter(held, probe, grids) if grids and has_places else None
