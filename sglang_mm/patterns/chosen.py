"""What the online selection found for one layer of one prompt: concrete sets, per unit and pair of modalities.

A *unit* is a head, or a group of heads that share K/V and a selection. A *panel* is the part of a unit's mask that one
pattern decides: rows of one modality (None: all rows) against keys of one modality (None: all keys). The panels of a
unit do not overlap and cover every row and key; one softmax runs over their union.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.types import Axis, Classes, Modality, TokenMap, digest64

BLOCK = 128
"""Slashes and blocks live on the fixed grid of 128 original positions, so that no mask depends on a kernel's tile."""


@dataclass(frozen=True, eq=False)
class Nothing:
    """For patterns that need no online choice: dense, a_shape, tri_shape."""

    def tables(self) -> list[Tensor]:
        return []


@dataclass(frozen=True, eq=False)
class Lines:
    """vertical_slash: columns int64 [n], key positions; diagonals int64 [m], differences of 128-blocks.

    Each once, ascending, from 0 on. Raises ConfigError if they are not.
    """

    columns: Tensor
    diagonals: Tensor

    def __post_init__(self):
        _check_set("columns", self.columns)
        _check_set("diagonals", self.diagonals)

    def tables(self) -> list[Tensor]:
        return [self.columns, self.diagonals]


@dataclass(frozen=True, eq=False)
class Phases:
    """grid: the axis taken; classes int64 [n] of `TokenMap.classes(axis)`; shifts int64 [m, 2]. Each once, ascending.

    A shift is (name space, s): a query sees keys of its item with (class of query - class of key) mod classes == s.
    Raises ConfigError for classes or shifts that repeat or descend.
    """

    axis: Axis
    classes: Tensor
    shifts: Tensor

    def __post_init__(self):
        _check_set("classes", self.classes)
        if self.shifts.dim() != 2 or self.shifts.shape[1] != 2:
            raise ConfigError(f"shifts {tuple(self.shifts.shape)}", "int64 [m, 2]", "pass (name space, shift) pairs")
        _check_set("shifts", self.shifts[:, 0] * (1 << 32) + self.shifts[:, 1])

    def tables(self) -> list[Tensor]:
        return [self.classes, self.shifts]


@dataclass(frozen=True, eq=False)
class BlockSet:
    """blocks: for row block row_blocks[i], the key blocks key_blocks[ptr[i] : ptr[i + 1]]. int64.

    Row blocks, and key blocks within each list, occur once and ascend. A rank holds the row blocks of its own rows and
    of the probe: not part of the digest. Raises ConfigError for row blocks or pointers that do not fit.
    """

    row_blocks: Tensor
    ptr: Tensor
    key_blocks: Tensor

    def __post_init__(self):
        _check_set("row_blocks", self.row_blocks)
        if len(self.ptr) != len(self.row_blocks) + 1 or int(self.ptr[-1]) != len(self.key_blocks):
            given = f"{len(self.ptr)} pointers for {len(self.row_blocks)} row blocks, {len(self.key_blocks)} key blocks"
            raise ConfigError(given, "one per row block, and the end", "count the key blocks of each row block")

    def tables(self) -> list[Tensor]:
        return []


Chosen = Nothing | Lines | Phases | BlockSet

NEEDS = {
    Dense: Nothing,
    AShape: Nothing,
    TriShape: Nothing,
    VerticalSlash: Lines,
    Grid: Phases,
    Blocks: BlockSet,
}
"""What the online selection finds for each pattern."""


def check_kind(pattern: Pattern, chosen: Chosen) -> None:
    """Raise ConfigError when `chosen` belongs to another pattern."""
    if not isinstance(chosen, NEEDS[type(pattern)]):
        given, needed = f"{type(chosen).__name__} for {pattern}", NEEDS[type(pattern)].__name__
        raise ConfigError(given, needed, "pass what was selected for this pattern")


@dataclass(frozen=True)
class Marks:
    """What the host needs to know of a set: classes, and (name space, shift) pairs. Few numbers; columns are many."""

    classes: tuple[int, ...] = ()
    shifts: tuple[tuple[int, int], ...] = ()


def read_marks(sets: Sequence[Chosen], tokens: TokenMap) -> list[Marks]:
    """The marks of each set, with one transfer to the host for all.

    Raises ConfigError for columns, classes or shifts that the prompt does not have.
    """
    phases = [each for each in sets if isinstance(each, Phases)]
    columns = [each.columns for each in sets if isinstance(each, Lines) and len(each.columns)]
    tables = [_join(columns).max().view(1)] if columns else []
    if phases:
        tables += _join([each.classes for each in phases]), _join([each.shifts for each in phases]).flatten()
    numbers = iter(_join(tables).tolist() if tables else ())
    if columns and (largest := next(numbers)) >= len(tokens):
        raise ConfigError(f"column {largest}", f"positions below {len(tokens)}", "select for this prompt")
    classes = [tuple(islice(numbers, len(each.classes))) for each in phases]
    shifts = [tuple((next(numbers), next(numbers)) for _ in range(len(each.shifts))) for each in phases]
    found = iter([Marks(*each) for each in zip(classes, shifts)])
    marks = [next(found) if isinstance(each, Phases) else Marks() for each in sets]
    for each, mark in zip(sets, marks):
        if isinstance(each, Phases):
            _check_marks(mark, tokens.classes(each.axis))
    return marks


def _join(tables: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.cpu() for each in tables] if len({each.device for each in tables}) > 1 else list(tables))


def _check_marks(marks: Marks, classes: Classes) -> None:
    """Classes ascend: the last one tells."""
    if marks.classes and marks.classes[-1] >= len(classes):
        raise ConfigError(f"class {marks.classes[-1]}", f"below {len(classes)}", "select for this prompt")
    sizes = [stop - start for start, stop in pairwise(classes.starts)]
    for space, shift in marks.shifts:
        if space >= len(sizes) or not 0 <= shift < sizes[space]:
            allowed = f"0 <= shift < size of the name space, sizes {sizes}"
            raise ConfigError(f"shift {shift} in name space {space}", allowed, "select for this prompt")


def _check_set(name: str, members: Tensor) -> None:
    if members.dim() != 1 or members.dtype != torch.int64:
        raise ConfigError(f"{name} {members.dtype} {tuple(members.shape)}", "int64 [n]", "pass a list of numbers")
    if bool((members.diff(prepend=members.new_full((1,), -1)) <= 0).any()):
        raise ConfigError(f"{name} {members[:4].tolist()}..", "each once, ascending, from 0 on", "sort them")


@dataclass(frozen=True, eq=False)
class Panel:
    """Raises ConfigError when `chosen` belongs to another pattern."""

    rows: Modality | None
    keys: Modality | None
    pattern: Pattern
    chosen: Chosen

    def __post_init__(self):
        check_kind(self.pattern, self.chosen)


@dataclass(frozen=True, eq=False)
class Unit:
    """heads: query heads of one K/V group that share the panels."""

    heads: tuple[int, ...]
    panels: tuple[Panel, ...]

    @property
    def is_dense(self) -> bool:
        """Whether every row sees everything."""
        return all(isinstance(panel.pattern, Dense) for panel in self.panels)


@dataclass(frozen=True, eq=False)
class Selection:
    """One layer, one prompt. group: query heads per K/V head."""

    units: tuple[Unit, ...]
    group: int

    @property
    def is_dense(self) -> bool:
        """Whether every row of every unit sees everything."""
        return all(unit.is_dense for unit in self.units)

    def split_dense(self) -> tuple[tuple[int, ...], "Selection | None"]:
        """(heads of dense units, ascending; the other units, heads numbered as before). None where all are dense.

        Causal attention computes a dense head faster than a program does.
        """
        heads = tuple(sorted(head for unit in self.units if unit.is_dense for head in unit.heads))
        others = tuple(unit for unit in self.units if not unit.is_dense)
        return heads, Selection(others, self.group) if others else None

    def of_kv_heads(self, first: int, stop: int) -> "Selection":
        """The units of K/V heads first .. stop - 1, their query heads numbered from 0 on.

        Raises ConfigError for no K/V head, or one that no unit is of.
        """
        heads = range(first * self.group, stop * self.group)
        units = tuple(unit for unit in self.units if unit.heads[0] in heads)
        if not first < stop or {head // self.group for unit in units for head in unit.heads} != set(range(first, stop)):
            held = sorted({unit.heads[0] // self.group for unit in self.units})
            raise ConfigError(f"K/V heads {first} .. {stop - 1}", f"some of {held}", "ask for heads of this selection")
        moved = [Unit(tuple(head - heads.start for head in unit.heads), unit.panels) for unit in units]
        return Selection(tuple(moved), self.group)

    def digest(self) -> int:
        """64 bits that differ when any rank chose otherwise."""
        panels = [panel for unit in self.units for panel in unit.panels]
        units = [(unit.heads, len(unit.panels)) for unit in self.units]
        axes = [str(panel.chosen.axis) if isinstance(panel.chosen, Phases) else "" for panel in panels]
        numbers = [(panel.rows, panel.keys, repr(panel.pattern), axis) for panel, axis in zip(panels, axes)]
        tables = [table for panel in panels for table in panel.chosen.tables()]
        joined = [_join([table.flatten() for table in tables]).cpu()] if tables else []  # one wait, not one per table
        return digest64([self.group, *units, *numbers, *map(len, tables)], *joined)
