"""What panels cost: the pairs they compute over the causal ones, for the rows of the chunk, over all ranks.

Rows before the chunk were computed before, and rows after it will be priced with their own chunk.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK, BlockSet, Panel
from sglang_mm.patterns.density import causal_pairs, pairs
from sglang_mm.patterns.select.held import Held
from sglang_mm.types import TokenMap

BlockPairs = Mapping[Panel, int]
"""Pairs computed by panels of blocks, on all ranks together: no rank could count them alone."""


def share(held: Held, panel: Panel, in_blocks: BlockPairs) -> float:
    """Pairs computed over causal pairs; 1 for a panel without any. The same on all ranks."""
    causal = causal_pairs(held.tokens, panel.rows, panel.keys, held.chunk)
    return computed(held.tokens, held.chunk, panel, in_blocks) / causal if causal else 1.0


def densities(
    tokens: TokenMap, chunk: range, panels_of_units: Sequence[Sequence[Panel]], in_blocks: BlockPairs
) -> tuple[float, ...]:
    """Per unit the pairs of its panels over the causal pairs of all the chunk's rows."""
    causal = causal_pairs(tokens, within=chunk)
    return tuple(
        sum(computed(tokens, chunk, panel, in_blocks) for panel in panels) / causal for panels in panels_of_units
    )


def computed(tokens: TokenMap, chunk: range, panel: Panel, in_blocks: BlockPairs) -> int:
    if panel in in_blocks:
        return in_blocks[panel]
    return pairs(panel.pattern, tokens, panel.chosen, panel.rows, panel.keys, chunk)


def pairs_in_blocks(held: Held, panels: Sequence[Panel]) -> dict[Panel, int]:
    """For the panels of blocks among these. Each row block is counted by the first rank that lists it; a collective."""
    panels = [panel for panel in panels if isinstance(panel.chosen, BlockSet)]
    first_lister = {}
    for rows in dict.fromkeys(panel.rows for panel in panels):
        listed = next(panel.chosen.row_blocks for panel in panels if panel.rows == rows)
        flags = torch.zeros(-(-len(held.tokens) // BLOCK), dtype=torch.int64, device=held.device)
        flags[listed] = 1
        first_lister[rows] = held.peers.gather(flags).argmax(dim=0)
    counts = []
    for panel in panels:
        own = _only(panel.chosen, first_lister[panel.rows][panel.chosen.row_blocks] == held.peers.rank)
        counts.append(pairs(panel.pattern, held.tokens, own, panel.rows, panel.keys, held.chunk))
    return dict(zip(panels, held.peers.sum(torch.tensor(counts, device=held.device)).tolist())) if panels else {}


def _only(chosen: BlockSet, is_kept: Tensor) -> BlockSet:
    """The lists of some row blocks."""
    counts = chosen.ptr.diff()
    ptr = torch.nn.functional.pad(counts[is_kept].cumsum(0), (1, 0))
    return BlockSet(chosen.row_blocks[is_kept], ptr, chosen.key_blocks[is_kept.repeat_interleave(counts)])
