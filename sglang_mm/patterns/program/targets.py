"""What the rows of one group look into, whatever piece of keys comes by: sources of keys, and bounds.

    dense row      raw keys      0 <= pos_q - pos_k < inf        0 <= pos_k < inf
    sparse row     raw keys      0 <= pos_q - pos_k < inf        0 <= pos_k < sink
                   raw keys      0 <= pos_q - pos_k < window     sink <= pos_k < inf
                   blocks        window <= pos_q - pos_k < inf   sink <= pos_k < inf
                   lines         the same, less the blocks that the row tile visits

Bounds have two sides each: with a lower one alone, sink, window and lines would show some keys twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Blocks, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Panel
from sglang_mm.patterns.program.shard import Seams, Tiles, nth, spread
from sglang_mm.patterns.program.sources import ClassLines, ColumnLines, Raw, Source
from sglang_mm.types import INF

Bounds = tuple[int, int, int, int]
EVERYTHING: Bounds = (0, INF, 0, INF)


@dataclass(frozen=True, eq=False)
class Target:
    """All rows of one group into one source.

    blocks: int64 [2, n], (tile of the group, block of keys); None: into all of the source. beside: into the lines
    beside the blocks of the target that follows.
    """

    group: int
    source: Source
    bounds: Bounds
    beside: bool = False
    blocks: Tensor | None = None


def targets_of(group: int, tiles: Tiles, panel: Panel, is_dense: bool) -> list[Target]:
    """What the rows in `tiles`, a group of the panel, look into. Raises ConfigError for rows without chosen blocks."""
    pattern, chosen = panel.pattern, panel.chosen
    in_blocks = panel.keys is None or (isinstance(pattern, VerticalSlash | Blocks) and not is_dense)
    raw = Raw(panel.keys, Seams.BLOCKS if in_blocks else Seams.JUMPS)
    if is_dense:
        return [Target(group, raw, EVERYTHING)]
    if isinstance(pattern, Blocks):
        return [Target(group, raw, EVERYTHING, blocks=_listed_blocks(tiles, chosen))]
    sink, window = pattern.sink, pattern.window
    far = (window, INF, sink, INF)
    found = [Target(group, raw, (0, window, sink, INF))]
    if sink:
        found.append(Target(group, raw, (0, INF, 0, sink)))
    if isinstance(pattern, VerticalSlash):
        found.append(Target(group, ColumnLines(panel.keys, sink, chosen.columns), far, beside=True))
        found.append(Target(group, raw, far, blocks=_diagonal_blocks(tiles, chosen.diagonals)))
    elif isinstance(pattern, Grid):
        lines = tuple(chosen.classes.tolist()) if pattern.vertical else ()
        found.append(Target(group, ClassLines(panel.keys, sink, chosen.axis, lines), far))
    return found


def _diagonal_blocks(tiles: Tiles, diagonals: Tensor) -> Tensor:
    block = (tiles.first // BLOCK)[:, None] - diagonals.to(tiles.first.device)
    row, diagonal = (block >= 0).nonzero(as_tuple=True)
    return torch.stack([row, block[row, diagonal]])


def _listed_blocks(tiles: Tiles, chosen: BlockSet) -> Tensor:
    row_block = tiles.first // BLOCK
    device = row_block.device
    at = torch.searchsorted(chosen.row_blocks.to(device), row_block).clamp(max=max(0, len(chosen.row_blocks) - 1))
    if not len(chosen.row_blocks) or bool((chosen.row_blocks.to(device)[at] != row_block).any()):
        given = f"blocks for row blocks {chosen.row_blocks.tolist()[:8]}.."
        raise ConfigError(given, f"row blocks {row_block.unique().tolist()[:8]}..", "select with the rows of this rank")
    ptr = chosen.ptr.to(device)
    counts = ptr[at + 1] - ptr[at]
    listed = chosen.key_blocks.to(device)[spread(ptr[at], counts) + nth(counts)]
    return torch.stack([spread(torch.arange(len(at), device=device), counts), listed])
