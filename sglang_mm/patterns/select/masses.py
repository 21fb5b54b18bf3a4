"""Pass 2: how much attention the probe gives to each key, to each distance, and to each difference of classes.

kernels/probe.py sums them: two numbers per key hold the masses of columns, of classes, and of distances, for any choice
of keys. Here it is said which pairs count towards differences of classes, and they are found from sums by class.
U units, R probe rows, K keys of this rank, C classes, N counts by class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.kernels import probe as kernels
from sglang_mm.kernels.probe import BIN, FIXED_POINT, ClassCounts, fixed
from sglang_mm.patterns.catalog import Grid, Pattern
from sglang_mm.patterns.select.held import Heads, Held
from sglang_mm.patterns.select.probe import Probe
from sglang_mm.types import Axis, Modality

__all__ = ["BIN", "FIXED_POINT", "Masses", "Want", "fixed", "measure_masses"]


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


def measure_masses(held: Held, probe: Probe, units: Sequence[Heads], wants: Sequence[Want]) -> Masses:
    """One pass over this rank's keys. wants: those of class differences say which are measured."""
    shifts = _make_shifts(held, probe, wants)
    columns, early, by_class = kernels.key_masses(
        probe.q_RHD,
        held.k_KGD,
        held.pos_k,
        probe.rows,
        units,
        probe.lse_HR,
        scale=held.scale,
        by_class=shifts.counts if shifts else None,
    )
    return Masses(probe, columns, early, shifts.of(by_class) if shifts else {})


class _Shifts:
    """Mass by class difference from mass by probe row and class of the key, int64 [N, R, C].

    C: the frame axis' classes in the name spaces of the probe's rows. A class along the row axis follows from that
    along the frame axis. A row's differences are its classes turned by its own, so that this is done once for each
    row, and not for each key.
    """

    def __init__(self, held: Held, probe: Probe, wants: Sequence[Want]):
        self._wants, self._tokens, self._rows = wants, held.tokens, probe.positions
        frame = held.tokens.classes(Axis.FRAME)
        spaces_C = frame.spaces.to(held.device)
        row_R = frame.of_token[self._rows].long()
        is_near_C = torch.isin(spaces_C, spaces_C[row_R[row_R >= 0]])
        self._near = is_near_C.nonzero().flatten()
        near_C = torch.where(is_near_C, is_near_C.cumsum(0) - 1, -1)
        near_C = torch.nn.functional.pad(near_C, (0, 1), value=-1).int()  # its end is for class -1
        self._numbers = {number: place for place, number in enumerate(dict.fromkeys(map(_pairs_of, wants)))}
        item_R = held.tokens.item[self._rows]
        self.counts = ClassCounts(
            row_item=item_R.where(held.tokens.place[self._rows] >= 0, -1),
            key_item=held.tokens.item[held.pos_k],
            key_class=near_C[held.keys.classes(Axis.FRAME).long()],
            classes=len(self._near),
            counts=tuple(self._numbers),
        )

    def of(self, mass_NRC: Tensor) -> dict[tuple[Want, Axis], Tensor]:
        by_axis = {axis: self._by_difference(mass_NRC, axis) for axis in Axis}
        return {
            (want, axis): by_axis[axis][self._numbers[_pairs_of(want)]]
            for want in self._wants
            for axis in Axis
            if want.pattern.axis in (axis, "auto")
        }

    def _by_difference(self, mass_NRC: Tensor, axis: Axis) -> Tensor:
        """int64 [N, classes along the axis]."""
        classes = self._tokens.classes(axis)
        starts = torch.tensor(classes.starts, device=self._rows.device)
        row_R1 = classes.of_token[self._rows].long().clamp(min=0)[:, None]  # one off the grid has no mass
        space_R1 = classes.spaces.to(self._rows.device)[row_R1]
        difference_RC = (row_R1 - self._near_along(axis)) % (starts[space_R1 + 1] - starts[space_R1])
        index_X = (starts[space_R1] + difference_RC).flatten()
        mass_NX = mass_NRC.flatten(1)
        return mass_NX.new_zeros(len(mass_NX), len(classes)).scatter_add_(1, index_X.expand_as(mass_NX), mass_NX)

    def _near_along(self, axis: Axis) -> Tensor:
        """int64 [C]: the near classes' classes along the axis."""
        frame_S, class_S = (self._tokens.classes(each).of_token for each in (Axis.FRAME, axis))
        is_place_S = frame_S >= 0
        class_of = class_S.new_zeros(len(self._tokens.classes(Axis.FRAME)))
        class_of[frame_S[is_place_S].long()] = class_S[is_place_S]
        return class_of[self._near].long()


def _pairs_of(want: Want) -> tuple[int, int, int]:
    """What decides which pairs of places a want counts."""
    return want.unit, want.pattern.sink, want.pattern.window


def _make_shifts(held: Held, probe: Probe, wants: Sequence[Want]) -> _Shifts | None:
    """None where no grid takes class differences, or no probe row is a place of a frame."""
    grids = [want for want in wants if isinstance(want.pattern, Grid) and want.pattern.slash]
    has_places = bool((held.tokens.place[probe.rows.start : probe.rows.stop] >= 0).any())
    return _Shifts(held, probe, grids) if grids and has_places else None
