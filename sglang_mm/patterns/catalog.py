"""What an attention head attends to. A plan gives patterns, which hold numbers; sets found online are in chosen.py.

A query at position i sees keys at positions j <= i, itself always. Distances are differences of positions in the
prompt, so that no mask depends on how a kernel cuts it.

| pattern | a row sees (MMInference, section 3, Tables 3 and 4; tri_shape is its baseline, blocks are ours) |
|---|---|
| dense | everything before it |
| a_shape | the first `sink` tokens and the last `window` |
| tri_shape | a_shape; the last `last` rows of the prompt see everything |
| vertical_slash | a_shape, the heaviest columns, the heaviest block diagonals |
| grid | a_shape, separators, lines of the heaviest classes, same-item keys at the heaviest class differences |
| blocks | its own block of 128, the first one, and the heaviest: enough to reach `threshold` of the estimated mass |

Legal for rows and keys of one kind of media, and for whole prompts: all. For other pairs of modalities a head may have
less; boundary.py has the table.
"""

from typing import Literal

import msgspec

from sglang_mm.errors import ConfigError
from sglang_mm.types import INF

SMALLEST = {"sink": 0, "window": 1, "last": 0, "vertical": 0, "slash": 0, "phases": 1}
"""Of each whole number, by the name of its field. A window of 1 is the row itself, so that no row is empty."""


class _Pattern(msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """Raises ConfigError for a number out of range, in a message that starts with the field's name."""

    def __post_init__(self):
        for name, kind in type(self).__annotations__.items():
            value, given = getattr(self, name), f"{name}: {getattr(self, name)!r} in {type(self).__name__}"
            if kind is bool and not isinstance(value, bool):
                raise ConfigError(given, "true or false", "pass a truth value")
            smallest = SMALLEST.get(name)
            if kind is int and (type(value) is not int or not smallest <= value <= INF):
                raise ConfigError(given, f"a whole number from {smallest} to {INF}", f"pass {smallest} or more")


class Dense(_Pattern, frozen=True, tag="dense"):
    pass


class AShape(_Pattern, frozen=True, tag="a_shape"):
    """sink >= 0, window >= 1, in tokens."""

    sink: int = 128
    window: int = 4096


class TriShape(_Pattern, frozen=True, tag="tri_shape"):
    """last >= 0: rows at the prompt's end that see everything."""

    sink: int = 128
    window: int = 4096
    last: int = 64


class VerticalSlash(_Pattern, frozen=True, tag="vertical_slash"):
    """vertical: columns, slash: diagonals, both in tokens; ceil(slash / 128) block diagonals are kept."""

    vertical: int = 1000
    slash: int = 2048
    sink: int = 32
    window: int = 128


class Grid(_Pattern, frozen=True, tag="grid"):
    """axis: along what lines repeat, `auto` is decided online. phases: classes kept per name space.

    vertical: keys of these classes are seen. horizontal: rows of these classes see everything.
    slash: class differences kept per name space. tail: rows of the text after the last media item see everything.
    """

    axis: Literal["frame", "row", "auto"] = "auto"
    vertical: bool = True
    horizontal: bool = False
    slash: int = 0
    phases: int = 1
    sink: int = 64
    window: int = 1024
    tail: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.axis not in ("frame", "row", "auto"):
            raise ConfigError(f"axis: {self.axis!r} in Grid", "frame, row, auto", "pass auto to decide online")
        if not (self.vertical or self.horizontal or self.slash):
            given = "vertical, horizontal, slash: none in Grid"
            raise ConfigError(given, "one of them or more", "name lines to keep, or take a_shape")


class Blocks(_Pattern, frozen=True, tag="blocks"):
    """0 < threshold <= 1: share of the estimated softmax mass per row block."""

    threshold: float = 0.95

    def __post_init__(self):
        is_number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not is_number or not 0 < self.threshold <= 1:
            given = f"threshold: {self.threshold!r} in Blocks"
            raise ConfigError(given, "0 < threshold <= 1", "pass the share of the mass to keep")


Pattern = Dense | AShape | TriShape | VerticalSlash | Grid | Blocks
