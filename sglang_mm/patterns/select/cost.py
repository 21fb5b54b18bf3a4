"""What panels cost: the share of their causal pairs that they compute, over the whole prompt and all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Dense
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Nothing, Panel
from sglang_mm.patterns.density import pairs
from sglang_mm.patterns.select.held import Held
from sglang_mm.types import Modality


def shares(held: Held, panels: Sequence[Panel]) -> list[float]:
    """Per panel pairs computed over causal pairs; 1 for a panel without any. The same on all ranks.

    Blocks are known for the rows of the chunk alone, and to the ranks that hold these rows: their share is that of the
    row blocks listed, each counted by the first rank that lists it.
    """
    made: dict = {}

    def once(panel: Panel) -> int:
        key = panel.pattern, panel.rows, panel.keys
        if not isinstance(panel.chosen, Nothing):
            return pairs(panel.pattern, held.tokens, panel.chosen, panel.rows, panel.keys)
        if key not in made:
            made[key] = pairs(panel.pattern, held.tokens, panel.chosen, panel.rows, panel.keys)
        return made[key]

    counts = [(0, 0)] * len(panels)
    in_blocks = [n for n, panel in enumerate(panels) if isinstance(panel.chosen, BlockSet)]
    for number, count in zip(in_blocks, _pairs_in_blocks(held, [panels[n] for n in in_blocks])):
        counts[number] = count
    for number, panel in enumerate(panels):
        if number not in in_blocks:
            counts[number] = once(panel), once(Panel(panel.rows, panel.keys, Dense(), Nothing()))
    return [seen / causal if causal else 1.0 for seen, causal in counts]


def causal_pairs(held: Held, panel: Panel) -> int:
    return pairs(Dense(), held.tokens, Nothing(), panel.rows, panel.keys)


def _pairs_in_blocks(held: Held, panels: Sequence[Panel]) -> list[tuple[int, int]]:
    """(pairs in the blocks, causal pairs of the row blocks listed) over all ranks."""
    if not panels:
        return []
    first_lister = {}
    for rows in dict.fromkeys(panel.rows for panel in panels):
        listed = next(panel.chosen.row_blocks for panel in panels if panel.rows == rows)
        flags = torch.zeros(-(-len(held.tokens) // BLOCK), dtype=torch.int64, device=held.device)
        flags[listed] = 1
        first_lister[rows] = held.peers.gather(flags).argmax(dim=0)
    counts = []
    for panel in panels:
        own = _only(panel.chosen, first_lister[panel.rows][panel.chosen.row_blocks] == held.peers.rank)
        seen = pairs(panel.pattern, held.tokens, own, panel.rows, panel.keys)
        counts.append([seen, _causal_pairs_of(held, own.row_blocks, panel)])
    return [tuple(pair) for pair in held.peers.sum(torch.tensor(counts, device=held.device)).tolist()]


def _only(chosen: BlockSet, is_kept: Tensor) -> BlockSet:
    """The lists of some row blocks."""
    counts = chosen.ptr.diff()
    ptr = torch.nn.functional.pad(counts[is_kept].cumsum(0), (1, 0))
    return BlockSet(chosen.row_blocks[is_kept], ptr, chosen.key_blocks[is_kept.repeat_interleave(counts)])


def _causal_pairs_of(held: Held, row_blocks: Tensor, panel: Panel) -> int:
    keys_until_S = _of(held, panel.keys).long().cumsum(0)
    position_S = torch.arange(len(keys_until_S), device=held.device)
    return int(keys_until_S[_of(held, panel.rows) & torch.isin(position_S // BLOCK, row_blocks)].sum())


def _of(held: Held, modality: Modality | None) -> Tensor:
    if modality is None:
        return torch.ones_like(held.tokens.modality, dtype=torch.bool)
    return held.tokens.modality == modality
