"""That all ranks hold one selection: compared before attention would deadlock on, or silently mix, two of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.errors import RankMismatch
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Panel, Selection
from sglang_mm.patterns.select.held import Held

ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D)  # multipliers that spread small numbers over 64 bits


def check_agreement(held: Held, selection: Selection) -> None:
    """Compare digests, then the lists of row blocks that several ranks hold. A collective of 8 bytes per row block.

    Raises RankMismatch, on all ranks, naming those that differ.
    """
    digest = selection.digest()
    signed = digest - (1 << 64) if digest >> 63 else digest
    digests = held.peers.gather(torch.tensor([signed], dtype=torch.int64, device=held.device)).flatten().tolist()
    if len(set(digests)) > 1:
        camps = [[rank for rank, each in enumerate(digests) if each == found] for found in dict.fromkeys(digests)]
        raise RankMismatch(f"selections differ between ranks {' and '.join(map(str, camps))}")
    panels = [panel for unit in selection.units for panel in unit.panels if isinstance(panel.chosen, BlockSet)]
    for rows in dict.fromkeys(panel.rows for panel in panels):
        own = _hashes([panel for panel in panels if panel.rows == rows], -(-len(held.tokens) // BLOCK), held.device)
        hash_CN = held.peers.gather(own)
        listed_CN = hash_CN != 0
        lowest_N = hash_CN.masked_fill(~listed_CN, torch.iinfo(torch.int64).max).amin(0)
        differs_N = (listed_CN & (hash_CN != lowest_N)).any(0)
        if bool(differs_N.any()):
            block = int(differs_N.nonzero()[0])
            ranks = listed_CN[:, block].nonzero().flatten().tolist()
            raise RankMismatch(f"the lists of row block {block} differ between ranks {ranks}")


def _hashes(panels: Sequence[Panel], blocks: int, device: torch.device) -> Tensor:
    """int64 [row blocks]: of what all panels list for it; 0 for what is not listed."""
    found = torch.zeros(blocks, dtype=torch.int64, device=device)
    for number, panel in enumerate(panels):
        chosen = panel.chosen
        key = (chosen.key_blocks + 1) * ODD[0] + number * ODD[1]
        key = (key ^ (key >> 29)) * ODD[1]
        row = chosen.row_blocks.repeat_interleave(chosen.ptr.diff())
        found.index_add_(0, row.to(device), (key ^ (key >> 32)).to(device))
    return found
