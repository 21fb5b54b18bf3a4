"""The sets of a layer's panels as a few flat arrays of small integers, and back. CPU only.

    columns     | of panel 0 | of panel 3 |            a panel's part of an array is as long as its sizes say
    row_blocks  | of panel 1 | of panel 2 |
    bits        | row block 0: 1 | row block 1: 11 | row block 2: 101 | ..     a bit per key block up to the row's own

Lists of key blocks take 1/16 byte per causal pair of blocks, 4 MiB at a million tokens, however many they list.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Pattern
from sglang_mm.patterns.chosen import NEEDS, BlockSet, Chosen, Lines, Nothing, Phases
from sglang_mm.types import Axis

TABLES = {"columns": 1, "diagonals": 1, "classes": 1, "shifts": 2, "row_blocks": 1, "bits": 1}
"""Every array, and its numbers per entry."""
INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
Arrays = dict[str, np.ndarray]


def to_arrays(chosen: Chosen) -> Arrays:
    """Those that this kind of sets has. Raises ConfigError for a list with key blocks after its row block."""
    match chosen:
        case Lines():
            return {"columns": _array(chosen.columns), "diagonals": _array(chosen.diagonals)}
        case Phases():
            return {"classes": _array(chosen.classes), "shifts": _array(chosen.shifts).reshape(-1)}
        case BlockSet():
            rows, counts, key_blocks = (
                _array(each) for each in (chosen.row_blocks, chosen.ptr.diff(), chosen.key_blocks)
            )
            if (key_blocks > rows.repeat(counts)).any():
                raise ConfigError("key blocks after their row block", "a causal list", "select again")
            starts, size = _places(rows)
            flags = np.zeros(size, dtype=bool)
            flags[starts.repeat(counts) + key_blocks] = True
            return {"row_blocks": rows, "bits": np.packbits(flags)}
        case Nothing():
            return {}


def from_arrays(pattern: Pattern, axis: Axis | None, arrays: Mapping[str, np.ndarray]) -> Chosen:
    """The inverse. axis: of a grid. Raises ConfigError for arrays that are no sets of the pattern."""
    kind = NEEDS[type(pattern)]
    if kind is Lines:
        return Lines(_long(arrays["columns"]), _long(arrays["diagonals"]))
    if kind is Phases:
        if axis is None:
            raise ConfigError("a grid without an axis", " or ".join(Axis), "keep the request again")
        return Phases(axis, _long(arrays["classes"]), _long(arrays["shifts"]).view(-1, 2))
    if kind is BlockSet:
        rows = arrays["row_blocks"].astype(np.int64)
        starts, size = _places(rows)
        if size != 8 * len(arrays["bits"]):
            given = f"{len(arrays['bits'])} bytes for the lists of {len(rows)} row blocks"
            raise ConfigError(given, f"{size // 8}", "keep the request again")
        flags = np.unpackbits(arrays["bits"])
        counts = np.add.reduceat(flags, starts, dtype=np.int64) if len(rows) else rows
        key_blocks = np.flatnonzero(flags) - starts.repeat(counts)
        return BlockSet(_long(rows), _long(np.concatenate([[0], counts.cumsum()])), _long(key_blocks))
    return Nothing()


def join(parts: Iterable[Arrays]) -> Arrays:
    """Every array of TABLES, of all parts one after another, in the smallest type."""
    parts = list(parts)
    none = [np.zeros(0, dtype=np.uint8)]
    return {name: narrow(np.concatenate(none + [each[name] for each in parts if name in each])) for name in TABLES}


class Cutter:
    """Takes joined arrays apart again, in the order in which they were joined."""

    def __init__(self, arrays: Arrays):
        self._arrays, self._taken = arrays, Counter()

    def take(self, sizes: Mapping[str, int]) -> Arrays:
        """The next so many numbers of each. Raises ConfigError where there are fewer."""
        found = {}
        for name, size in sizes.items():
            start = self._taken[name]
            self._taken[name] += size
            found[name] = self._arrays[name][start : start + size] if name in self._arrays else np.zeros(0)
            if len(found[name]) != size:
                raise ConfigError(f"{name}: {start + len(found[name])} numbers", "more", "keep the request again")
        return found

    def check_empty(self) -> None:
        """Raises ConfigError where numbers are left."""
        for name, array in self._arrays.items():
            if len(array) != self._taken[name]:
                raise ConfigError(f"{name}: {len(array)} numbers", f"{self._taken[name]}", "keep the request again")


def narrow(array: np.ndarray) -> np.ndarray:
    """The same integers in the smallest type that holds them."""
    low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
    return array.astype(next(each for each in INTEGERS if np.iinfo(each).min <= low and high <= np.iinfo(each).max))


def _places(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """int64: of each row block where its bits start, whole bytes each; and how many bits there are."""
    ends = ((rows // 8 + 1) * 8).cumsum()
    return np.concatenate([[0], ends[:-1]])[: len(rows)].astype(np.int64), int(ends[-1]) if len(ends) else 0


def _array(table: Tensor) -> np.ndarray:
    return table.cpu().numpy()


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
