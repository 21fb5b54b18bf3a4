"""Axis, classes and class differences of a grid (Algorithm 1, with coordinates for classes instead of moduli).

Along each axis the classes of largest mean mass per key are taken, the same number in each name space. The axis is the
one whose classes hold more mass beyond the share that as many keys hold on average:

    excess = sum over the taken classes of (mass - keys * mean mass per key)

and not, as in Algorithm 1, the one with the larger peak over mean: a column of every row is, frame by frame, a set of
places, and the heaviest of these is never lighter than their mean. The frame axis would always win.
N choices to make, K keys of this rank, C classes of one axis, A classes of both axes, frame first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import Phases
from sglang_mm.patterns.select.heaviest import heaviest, split_rows
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.lines import beyond_window, candidates
from sglang_mm.patterns.select.masses import Masses, Want, fixed
from sglang_mm.types import Axis, Classes

Axes = dict[Axis, Tensor]


@dataclass(frozen=True, eq=False)
class ClassMass:
    """What the probes of all chunks so far gave to each class: mass in fixed point, pairs of row and key. int64 [A]."""

    mass: Tensor
    pairs: Tensor


def choose_phases(
    held: Held, masses: Masses, wants: Sequence[Want], previous: Sequence[ClassMass | None]
) -> tuple[list[Phases], list[ClassMass]]:
    """Per want the choice, the same on all ranks, and the class masses with those of `previous` in them.

    Masses leave out what the grid's sink and window show anyway.
    """
    classes = {axis: held.tokens.classes(axis) for axis in Axis}
    mass_NA, shift_NA = _sums(held, masses, wants, classes)
    pairs_NA = _visible_pairs(held, masses, wants, classes)
    before = [each or ClassMass(torch.zeros_like(mass_NA[0]), torch.zeros_like(pairs_NA[0])) for each in previous]
    mass_NA = mass_NA + torch.stack([each.mass for each in before])
    pairs_NA = pairs_NA + torch.stack([each.pairs for each in before])

    sizes = [len(classes[axis]) for axis in Axis]
    tables = [dict(zip(Axis, table.split(sizes, dim=1))) for table in (mass_NA, pairs_NA, shift_NA)]
    found = _found(wants, classes, *tables)
    return found, [ClassMass(mass, pairs) for mass, pairs in zip(mass_NA, pairs_NA)]


def _sums(held: Held, masses: Masses, wants: Sequence[Want], classes: dict[Axis, Classes]) -> tuple[Tensor, Tensor]:
    """Mass by class, and by class difference, over all ranks' keys: int64 [N, A] each."""
    counted_NK = candidates(held, wants) & beyond_window(held, masses, wants)
    mass_NK = fixed(masses.columns[[want.unit for want in wants]] * counted_NK)
    by_class, by_shift = [], []
    for axis in Axis:
        by_class.append(_by_class(mass_NK, len(classes[axis]), held.keys.classes(axis)))
        none = torch.zeros_like(by_class[-1][0])
        by_shift.append(torch.stack([masses.shifts.get((want, axis), none) for want in wants]))
    sums = held.peers.sum(torch.stack([torch.cat(by_class, dim=1), torch.cat(by_shift, dim=1)]))
    return sums[0], sums[1]


def _by_class(numbers_NK: Tensor, classes: int, class_K: Tensor) -> Tensor:
    """int64 [N, C]: sums over the keys of each class. class_K: -1 for none."""
    sums = numbers_NK.new_zeros(len(numbers_NK), classes + 1)  # what has no class is counted in front, and dropped
    return sums.scatter_add_(1, (class_K.long() + 1).expand(len(numbers_NK), -1), numbers_NK)[:, 1:]


def _visible_pairs(held: Held, masses: Masses, wants: Sequence[Want], classes: dict[Axis, Classes]) -> Tensor:
    """int64 [N, A]: pairs of a probe row and a key of the class that the masses count, on any rank."""
    rows, made = masses.probe.rows, {}
    position_S = torch.arange(rows.stop, device=held.device)
    modality_S = held.tokens.modality[: rows.stop]
    for want in wants:
        key = want.keys, want.pattern.sink, want.pattern.window
        if key not in made:
            counted_S = (position_S >= want.pattern.sink) & (rows.stop - 1 - position_S >= want.pattern.window)
            if want.keys is not None:
                counted_S &= modality_S == want.keys
            pairs_S = (rows.stop - position_S).clamp(max=len(rows)) * counted_S
            made[key] = torch.cat(
                [_by_class(pairs_S[None], len(each), each.of_token[: rows.stop])[0] for each in classes.values()]
            )
    return torch.stack([made[want.keys, want.pattern.sink, want.pattern.window] for want in wants])


def _found(wants: Sequence[Want], classes: dict[Axis, Classes], mass: Axes, pairs: Axes, shift: Axes) -> list[Phases]:
    device = mass[Axis.FRAME].device
    grids = [want.pattern for want in wants]
    phases = torch.tensor([grid.phases * (grid.vertical or grid.horizontal) for grid in grids], device=device)
    slash = torch.tensor([grid.slash for grid in grids], device=device)
    taken, shifts, excess = {}, {}, []
    for axis in Axis:
        spaces_C = classes[axis].spaces.to(device)
        starts = torch.tensor(classes[axis].starts, device=device)
        is_taken_NC = heaviest(mass[axis].double() / pairs[axis].clamp(min=1), phases, spaces_C)
        is_shift_NC = heaviest(shift[axis], slash, spaces_C)
        sizes_NC = starts.diff()[spaces_C].double().expand_as(mass[axis])
        excess.append(_excess(mass[axis], pairs[axis], is_taken_NC) + _excess(shift[axis], 1 / sizes_NC, is_shift_NC))
        taken[axis] = split_rows(is_taken_NC)
        shifts[axis] = [torch.stack([spaces_C[c], c - starts[spaces_C[c]]], dim=1) for c in split_rows(is_shift_NC)]
    on_frame_axis = (excess[0] >= excess[1]).tolist()
    found = []
    for number, grid in enumerate(grids):
        axis = Axis(grid.axis) if grid.axis != "auto" else (Axis.FRAME if on_frame_axis[number] else Axis.ROW)
        found.append(Phases(axis, taken[axis][number], shifts[axis][number]))
    return found


def _excess(mass_NC: Tensor, keys_NC: Tensor, is_taken_NC: Tensor) -> Tensor:
    """fp64 [N], in fixed point. keys_NC: how many keys stand behind each class, in any unit."""
    keys = (keys_NC * is_taken_NC).sum(1).double() / keys_NC.sum(1).clamp(min=1e-9)
    return (mass_NC * is_taken_NC).sum(1) - mass_NC.sum(1) * keys
