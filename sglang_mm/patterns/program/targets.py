"""What the rows of one group look into, whatever piece of keys comes by: sources of keys, and bounds.

    dense row      raw keys      0 <= pos_q - pos_k < inf        0 <= pos_k < inf
    sparse row     raw keys      0 <= pos_q - pos_k < inf        0 <= pos_k < sink
                   raw keys      0 <= pos_q - pos_k < window     sink <= pos_k < inf
                   blocks        window <= pos_q - pos_k < inf   sink <= pos_k < inf
                   lines         the same, less the blocks that the row tile visits

Bounds have two sides each: with a lower one alone, sink, window and lines would show some keys twice.
"""

from dataclasses import dataclass

from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Marks, Panel
from sglang_mm.patterns.program.shard import Seams
from sglang_mm.patterns.program.sources import ClassLines, ColumnLines, Raw, Source
from sglang_mm.types import INF

Bounds = tuple[int, int, int, int]
EVERYTHING: Bounds = (0, INF, 0, INF)


@dataclass(frozen=True, eq=False)
class Target:
    """All rows of one group into one source.

    blocks: into blocks at the chosen diagonals, or into listed ones; None: into all of the source. beside: into the
    lines beside the blocks of the target that follows.
    """

    group: int
    source: Source
    bounds: Bounds
    beside: bool = False
    blocks: Lines | BlockSet | None = None


def targets_of(group: int, panel: Panel, marks: Marks, is_dense: bool) -> list[Target]:
    """What the rows of a group of the panel look into."""
    pattern, chosen = panel.pattern, panel.chosen
    in_blocks = panel.keys is None or (isinstance(pattern, VerticalSlash | Blocks) and not is_dense)
    raw = Raw(panel.keys, Seams.BLOCKS if in_blocks else Seams.JUMPS)
    if is_dense:
        return [Target(group, raw, EVERYTHING)]
    if isinstance(pattern, Blocks):
        return [Target(group, raw, EVERYTHING, blocks=chosen)]
    sink, window = pattern.sink, pattern.window
    far = (window, INF, sink, INF)
    found = [Target(group, raw, (0, window, sink, INF))]
    if sink:
        found.append(Target(group, raw, (0, INF, 0, sink)))
    if isinstance(pattern, VerticalSlash):
        found.append(Target(group, ColumnLines(panel.keys, sink, chosen.columns), far, beside=True))
        found.append(Target(group, raw, far, blocks=chosen))
    elif isinstance(pattern, Grid):
        classes = marks.classes if pattern.vertical else ()
        found.append(Target(group, ClassLines(panel.keys, sink, chosen.axis, classes), far))
    return found
