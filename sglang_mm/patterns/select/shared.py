"""Lists of key blocks that each rank holds for its own rows, joined: for whoever computes rows that are not its own.

    rank 0    panel A: row blocks 0 2 7    panel B: 0 2 7       one line of bits per list: a bit per key block
    rank 1    panel A: row blocks 1 2 7    panel B: 1 2 7       both: panel A: 0 1 2 7    panel B: 0 1 2 7

Bits bound what travels, whatever share of the keys the lists take: 1 KiB a list at a million tokens.
C ranks, P panels, N lists, E key blocks.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_mm.patterns.chosen import BlockSet, Selection
from sglang_mm.patterns.select.peers import Peers

ROW_BYTES = 4
"""In front of a list's bits: its row block, int32."""


def share_blocks(selection: Selection, peers: Peers) -> Selection:
    """The same selection with every BlockSet holding the lists of all ranks, ascending, each row block once.

    A collective, of two gathers for all panels together; of none where no panel has lists. All ranks hold one selection
    but for these, and equal lists of row blocks that several of them hold.
    """
    panels = [panel for unit in selection.units for panel in unit.panels if isinstance(panel.chosen, BlockSet)]
    if not panels or peers.size == 1:
        return selection
    joined = dict(zip(panels, _join([panel.chosen for panel in panels], peers)))
    units = [
        replace(
            unit, panels=tuple(replace(each, chosen=joined[each]) if each in joined else each for each in unit.panels)
        )
        for unit in selection.units
    ]
    return replace(selection, units=tuple(units))


def _join(blocks: Sequence[BlockSet], peers: Peers) -> list[BlockSet]:
    device = blocks[0].key_blocks.device
    widest = max((int(each.key_blocks.max()) + 1 for each in blocks if len(each.key_blocks)), default=1)
    counts_CP = peers.gather(torch.tensor([*(len(each.row_blocks) for each in blocks), widest], device=device)).cpu()
    lists_C, width = counts_CP[:, :-1].sum(1).tolist(), int(counts_CP[:, -1].max())
    own_NB = torch.cat([_pack(each, width) for each in blocks])
    packed_CNB = peers.gather(pad(own_NB, (0, 0, 0, max(lists_C) - len(own_NB))))
    of_ranks = [lines.split(lists) for lines, lists in zip(packed_CNB, _with_rest(counts_CP[:, :-1], max(lists_C)))]
    return [_unpack(torch.cat([parts[panel] for parts in of_ranks])) for panel in range(len(blocks))]


def _with_rest(counts_CP: Tensor, lines: int) -> list[list[int]]:
    """Per rank the lines of each panel, and how many follow that only fill up."""
    return [[*counts, lines - sum(counts)] for counts in counts_CP.tolist()]


def _pack(blocks: BlockSet, width: int) -> Tensor:
    """uint8 [N, ROW_BYTES + bytes]: per list its row block, then a bit for each of `width` key blocks."""
    lists, size = len(blocks.row_blocks), -(-width // 8)
    has_NE = torch.zeros(lists, size * 8, dtype=torch.uint8, device=blocks.key_blocks.device)
    line = torch.arange(lists, device=has_NE.device).repeat_interleave(blocks.ptr.diff().to(has_NE.device))
    has_NE[line, blocks.key_blocks] = 1
    bits = has_NE.view(lists, size, 8) << torch.arange(8, dtype=torch.uint8, device=has_NE.device)
    row = blocks.row_blocks.to(has_NE.device).int()[:, None].contiguous().view(torch.uint8)
    return torch.cat([row, bits.sum(2, dtype=torch.uint8)], 1)


def _unpack(packed_NB: Tensor) -> BlockSet:
    """Of the lists of one panel from all ranks; of equal row blocks, which have equal lists, one stays."""
    rows = packed_NB[:, :ROW_BYTES].reshape(-1).view(torch.int32).long()
    rows, order = rows.sort(stable=True)
    is_first = rows.diff(prepend=rows.new_full((1,), -1)) > 0
    bytes_NB = packed_NB[order[is_first], ROW_BYTES:]
    has_NE = (bytes_NB[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).flatten(1).bool()
    ptr = pad(has_NE.sum(1).cumsum(0), (1, 0))
    return BlockSet(rows[is_first], ptr, has_NE.nonzero()[:, 1].contiguous())
