"""What one head does at the borders between modalities: MMInference, section 3.2 and Algorithms 2 and 3.

| boundary | patterns |
|---|---|
| none | one, for all rows and keys |
| k | the same; a label of the search for heads whose keys change at a border (no row does) |
| q | one per modality of the rows, each with a selection from that modality's last rows |
| 2d | one per pair of modalities, rows and keys; pairs that are not named are dense |

| rows -> keys under 2d | dense, a_shape, vertical_slash, blocks | grid, vertical lines alone | other grids, tri_shape |
|---|---|---|---|
| video -> video, image -> image | yes | yes | yes |
| text -> image or video, image <-> video | yes | yes | no |
| any -> text | yes | no | no |

As printed, Algorithm 3 normalises each pair for itself; here one softmax runs over all panels of a row.
"""

from collections.abc import Iterable

import msgspec

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, VerticalSlash
from sglang_mm.types import Modality

Pair = tuple[Modality, Modality]
"""(rows, keys)."""


class NoBoundary(msgspec.Struct, frozen=True, tag_field="boundary", tag="none", forbid_unknown_fields=True):
    pattern: Pattern


class KBoundary(msgspec.Struct, frozen=True, tag_field="boundary", tag="k", forbid_unknown_fields=True):
    pattern: Pattern


class QBoundary(msgspec.Struct, frozen=True, tag_field="boundary", tag="q", forbid_unknown_fields=True):
    text: Pattern = Dense()
    image: Pattern = Dense()
    video: Pattern = Dense()


class Boundary2D(msgspec.Struct, frozen=True, tag_field="boundary", tag="2d", forbid_unknown_fields=True):
    """pairs: "rows-keys", as in "video-text", to the pattern. Raises ConfigError for what is not legal for a pair."""

    pairs: dict[str, Pattern] = {}

    def __post_init__(self):
        for name, pattern in self.pairs.items():
            if name not in PAIRS:
                raise ConfigError(f"pairs.{name}", " | ".join(PAIRS), "name the rows' modality, a dash, the keys'")
            if not _is_legal(PAIRS[name], pattern):
                given = f"pairs.{name}: {pattern}"
                raise ConfigError(given, legal_patterns(PAIRS[name]), "leave the pair out to make it dense")


HeadPlan = NoBoundary | KBoundary | QBoundary | Boundary2D

PAIRS: dict[str, Pair] = {f"{rows.name}-{keys.name}".lower(): (rows, keys) for rows in Modality for keys in Modality}


def panels(plan: HeadPlan, modalities: Iterable[Modality]) -> list[tuple[Modality | None, Modality | None, Pattern]]:
    """(rows, keys, pattern) of each panel in a prompt with these modalities; None stands for all rows, or all keys.

    Panels do not overlap and cover every row and key of the prompt.
    """
    present = sorted(set(modalities))
    match plan:
        case QBoundary():
            return [(rows, None, getattr(plan, rows.name.lower())) for rows in present]
        case Boundary2D():
            pairs = {PAIRS[name]: pattern for name, pattern in plan.pairs.items()}
            return [(rows, keys, pairs.get((rows, keys), Dense())) for rows in present for keys in present]
        case _:
            return [(None, None, plan.pattern)]


def legal_patterns(pair: Pair) -> str:
    """In words, what a head may do with rows of one modality and keys of another under a 2d boundary."""
    rows, keys = pair
    if keys == Modality.TEXT:
        return "dense, a_shape, vertical_slash, blocks"
    if rows != keys:
        return (
            "dense, a_shape, vertical_slash, blocks, grid with vertical lines alone "
            "(vertical true, horizontal false, slash 0, tail false)"
        )
    return "every pattern"


def _is_legal(pair: Pair, pattern: Pattern) -> bool:
    """Only rows and keys of one kind of media have everything. Text has no lines, and between two modalities neither
    rows of a class nor differences of classes repeat; vertical lines of media keys do, for whatever rows."""
    rows, keys = pair
    if rows == keys != Modality.TEXT:
        return True
    if isinstance(pattern, Grid):
        only_vertical = pattern.vertical and not (pattern.horizontal or pattern.slash or pattern.tail)
        return only_vertical and keys != Modality.TEXT
    return isinstance(pattern, Dense | AShape | VerticalSlash | Blocks)
