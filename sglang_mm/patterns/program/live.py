"""Lines beside blocks: a column that lies in a block which the row tile visits is seen there, so its line hides it.

Without this, slashes and columns that cross are counted twice. It depends on the row tile, hence one bit per key and
entry; only tiles of lines with a hidden key get bits. The keys of a block lie side by side in a list of columns: they
are hidden as a range.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.ragged import spread
from sglang_mm.patterns.program.reaches import Runs, Visits
from sglang_mm.patterns.program.shard import Shard, Tiles

WORD = 64


class Lists(NamedTuple):
    """Where the lists of columns are among sources, tiles and the table of keys: the first of each, and how many."""

    source: int
    tile: int
    key: int
    count: int


class Hidden(NamedTuple):
    """Of each visit, int64: the run of its lines, first and last + 1 key of the block in the table of keys, and the
    tiles of the run that hold such keys, from `start` to before `stop`; none where there are no lines."""

    run: Tensor
    first: Tensor
    last: Tensor
    start: Tensor
    stop: Tensor


def hide_blocks(
    runs: Runs, run_of: Tensor, beside: Tensor, visits: Visits, tiles: Tiles, keys: Shard, lists: Lists
) -> tuple[Runs, Tensor]:
    """Cut runs of lines beside blocks into single tiles, and clear the bits of keys in blocks that the item visits.

    run_of: int64 [reaches], the run of each reach, or -1. beside: bool [runs], one or more. Returns all runs, in order
    of items, and the bits int64 [L, 2].
    """
    device = runs.item.device
    pieces = torch.where(beside, runs.stop - runs.start, 1)
    before = torch.cumsum(pieces, 0) - pieces
    hidden = _find_hidden(runs, run_of, visits, tiles, keys, lists)
    spans = hidden.stop - hidden.start
    total, found = torch.stack([pieces.sum(), spans.sum()]).tolist()

    number = spread(torch.arange(len(pieces), device=device), pieces, total)
    cut = runs.at(number)
    is_line = beside.index_select(0, number)
    start = cut.start + (torch.arange(total, device=device) - before.index_select(0, number)).int()

    visit = spread(torch.arange(len(spans), device=device), spans, found)
    offset = hidden.start - (torch.cumsum(spans, 0) - spans)
    tile = offset.index_select(0, visit) + torch.arange(found, device=device)
    entry = (before - runs.start).index_select(0, hidden.run).index_select(0, visit) + tile
    first, last = hidden.first.index_select(0, visit), hidden.last.index_select(0, visit)
    touched = torch.zeros(total, dtype=torch.bool, device=device)
    touched[entry] = True
    rows = torch.cumsum(touched, 0)
    live = torch.where(touched, rows - 1, -1)
    bits = torch.zeros(int(rows[-1]), 2, dtype=torch.int64, device=device)
    words = _words(first - tiles.ptr.index_select(0, tile), last - tiles.ptr.index_select(0, tile))
    bits.index_add_(0, live.index_select(0, entry), words)  # no key is in two blocks: no bit is added twice

    is_full = (cut.full <= start) & (start < cut.full_stop) & ~touched
    full = torch.where(is_line, torch.where(is_full, start, start + 1), cut.full)
    stop, full_stop = (torch.where(is_line, start + 1, each) for each in (cut.stop, cut.full_stop))
    return replace(cut, start=start, stop=stop, full=full, full_stop=full_stop, live=live.int()), ~bits


def _find_hidden(runs: Runs, run_of: Tensor, visits: Visits, tiles: Tiles, keys: Shard, lists: Lists) -> Hidden:
    reach = visits.lines
    run = torch.where(reach < 0, -1, run_of.index_select(0, reach.clamp(min=0)))
    has_lines, run = run >= 0, run.clamp(min=0)
    start, stop = runs.start.index_select(0, run), runs.stop.index_select(0, run)
    number = tiles.source.index_select(0, start) - lists.source
    border, tile_of, tiles_before = _borders(tiles, keys, lists)
    at = torch.where(has_lines, number, 0) * (len(keys.holds_block()) + 1) + visits.block
    first, last = border.index_select(0, at), border.index_select(0, at + 1)
    start = torch.maximum(start, tile_of.index_select(0, at))
    stop = torch.minimum(stop, tiles_before.index_select(0, at + 1))
    stop = torch.where(has_lines & (first < last), torch.maximum(start, stop), start)
    return Hidden(run, first, last, start, stop)


def _borders(tiles: Tiles, keys: Shard, lists: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Of each list and block: where its keys start in the table of keys, the tile there, and how many tiles hold keys
    before. int64 [lists * (blocks + 1)] each."""
    device, prompt = tiles.first.device, len(keys.tokens) + 2
    index = tiles.index[lists.key :]
    source = spread(tiles.source[lists.tile :], tiles.ptr[lists.tile :].diff(), len(index))
    placed = source * prompt + keys.positions.index_select(0, index)
    base = (torch.arange(lists.count, device=device) + lists.source) * prompt
    block = torch.arange(len(keys.holds_block()) + 1, device=device) * BLOCK
    border = torch.searchsorted(placed, (base[:, None] + block.clamp(max=prompt - 1)).flatten()) + lists.key
    return border, torch.searchsorted(tiles.ptr, border, right=True) - 1, torch.searchsorted(tiles.ptr, border)


def _words(first: Tensor, last: Tensor) -> Tensor:
    """int64 [n, 2]: bits first .. last - 1 of 128, each cut to what there is."""
    below = _ones(torch.stack([first, first - WORD, last, last - WORD], 1))
    return below[:, 2:] - below[:, :2]


def _ones(count: Tensor) -> Tensor:
    """int64: the lowest bits set, at most 64; in two steps, for no shift is by 64."""
    count = count.clamp(0, WORD)
    half = count // 2
    return ((1 << half) << (count - half)) - 1
