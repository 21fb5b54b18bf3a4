"""Lines beside blocks: a column that lies in a block which the row tile visits is seen there, so its line hides it.

Without this, slashes and columns that cross are counted twice. It depends on the row tile, hence one bit per key and
entry; only tiles of lines with a hidden key get bits.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.reaches import Runs, Visits
from sglang_mm.patterns.program.shard import Shard, Tiles, nth, spread

WORD = 64


def hide_blocks(
    runs: Runs, run_of: Tensor, beside: Tensor, visits: Visits, tiles: Tiles, keys: Shard
) -> tuple[list[Runs], Tensor]:
    """Cut runs of lines beside blocks into single tiles, and clear the bits of keys in blocks that the item visits.

    run_of: int32 [reaches], the run of each reach, or -1. beside: bool [runs]. Returns the other runs and the cut ones,
    each in order of items, and the bits int64 [L, 2].
    """
    lines, others = beside.nonzero().flatten(), (~beside).nonzero().flatten()
    whole = runs.at(lines)
    count = whole.stop - whole.start
    number = spread(torch.arange(len(count), device=count.device), count)
    cut = whole.at(number)
    start = cut.start + nth(count).int()

    place = torch.cumsum(beside, 0) - 1  # of a run among the lines
    line_of = torch.where(run_of < 0, -1, place.index_select(0, run_of.clamp(min=0)))
    entry, bit = _hidden(whole, torch.cumsum(count, 0) - count, line_of, visits, tiles, keys)
    touched = torch.zeros_like(start, dtype=torch.bool)
    touched[entry] = True
    live = torch.where(touched, torch.cumsum(touched, 0) - 1, -1).int()
    hidden = torch.zeros(int(touched.sum()) * 2, dtype=torch.int64, device=start.device)
    hidden.index_add_(0, live.index_select(0, entry) * 2 + bit // WORD, torch.ones_like(bit) << bit % WORD)

    is_full = (cut.full <= start) & (start < cut.full_stop) & ~touched
    full = torch.where(is_full, start, start + 1)
    cut = replace(cut, start=start, stop=start + 1, full=full, full_stop=start + 1, live=live)
    return [runs.at(others), cut], ~hidden.view(-1, 2)


def _hidden(
    lines: Runs, cut_from: Tensor, line_of: Tensor, visits: Visits, tiles: Tiles, keys: Shard
) -> tuple[Tensor, Tensor]:
    """(index of the cut run, bit) of each line key that its item sees in a block, int64 each.

    line_of: int64 [reaches], index of the reach's run among `lines`, or -1.
    """
    size = tiles.ptr.diff()
    tile_of = spread(torch.arange(len(size), device=size.device), size)
    prompt = len(keys.tokens) + 2
    place = tiles.source.index_select(0, tile_of) * prompt + keys.positions.index_select(0, tiles.index)
    line = line_of.index_select(0, visits.lines.clamp(min=0))
    beside = ((visits.lines >= 0) & (line >= 0)).nonzero().flatten()
    line, block = line.index_select(0, beside), visits.block.index_select(0, beside)
    source = tiles.source.index_select(0, lines.start.index_select(0, line))
    first = torch.searchsorted(place, source * prompt + block * BLOCK)
    last = torch.searchsorted(place, source * prompt + block * BLOCK + BLOCK)
    some = (last > first).nonzero().flatten()
    line, first, count = line[some], first[some], (last - first)[some]
    at, line = spread(first, count) + nth(count), spread(line, count)
    tile = tile_of.index_select(0, at)
    met = ((tile >= lines.start[line]) & (tile < lines.stop[line])).nonzero().flatten()
    at, line, tile = at[met], line[met], tile[met]
    return cut_from[line] + tile - lines.start[line], at - tiles.ptr[tile]
