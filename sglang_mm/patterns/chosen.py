"""What the online selection found for one layer of one prompt: concrete sets, per unit and pair of modalities.

A *unit* is a head, or a group of heads that share K/V and a selection. A *panel* is the part of a unit's mask that one
pattern decides: rows of one modality (None: all rows) against keys of one modality (None: all keys). The panels of a
unit do not overlap and cover every row and key; one softmax runs over their union.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Pattern
from sglang_mm.types import Axis, Modality, digest64

BLOCK = 128
"""Slashes and blocks live on the fixed grid of 128 original positions, so that no mask depends on a kernel's tile."""


@dataclass(frozen=True, eq=False)
class Nothing:
    """For patterns that need no online choice: dense, a_shape, tri_shape."""

    def tables(self) -> list[Tensor]:
        return []


@dataclass(frozen=True, eq=False)
class Lines:
    """vertical_slash: columns int64 [n], key positions; diagonals int64 [m], differences of 128-blocks. Ascending."""

    columns: Tensor
    diagonals: Tensor

    def tables(self) -> list[Tensor]:
        return [self.columns, self.diagonals]


@dataclass(frozen=True, eq=False)
class Phases:
    """grid: the axis taken; classes int64 [n], ascending, of `TokenMap.classes(axis)`; shifts int64 [m, 2], ascending.

    A shift is (name space, s): a query sees keys of its item with (class of query - class of key) mod classes == s.
    """

    axis: Axis
    classes: Tensor
    shifts: Tensor

    def tables(self) -> list[Tensor]:
        return [torch.tensor([list(Axis).index(self.axis)]), self.classes, self.shifts]


@dataclass(frozen=True, eq=False)
class BlockSet:
    """blocks: for row block row_blocks[i], the key blocks key_blocks[ptr[i] : ptr[i + 1]]. int64, ascending each.

    A rank holds the row blocks of its own rows and of the probe: not part of the digest.
    """

    row_blocks: Tensor
    ptr: Tensor
    key_blocks: Tensor

    def tables(self) -> list[Tensor]:
        return []


Chosen = Nothing | Lines | Phases | BlockSet


@dataclass(frozen=True, eq=False)
class Panel:
    rows: Modality | None
    keys: Modality | None
    pattern: Pattern
    chosen: Chosen


@dataclass(frozen=True, eq=False)
class Unit:
    """heads: query heads of one K/V group that share the panels."""

    heads: tuple[int, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """One layer, one prompt. group: query heads per K/V head."""

    units: tuple[Unit, ...]
    group: int

    def digest(self) -> int:
        """64 bits that differ when any rank chose otherwise."""
        panels = [panel for unit in self.units for panel in unit.panels]
        units = [(unit.heads, len(unit.panels)) for unit in self.units]
        numbers = [(panel.rows, panel.keys, repr(panel.pattern)) for panel in panels]
        tables = [table.cpu() for panel in panels for table in panel.chosen.tables()]
        return digest64([self.group, *units, *numbers, *map(len, tables)], *tables)
