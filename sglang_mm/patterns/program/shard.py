"""Some tokens of one prompt, one rank's rows or one piece of keys, and how they are cut into tiles.

Nothing here depends on a head: a shard is made once per request and serves every layer. N tokens of the shard.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import BLOCK
from sglang_mm.patterns.program.ragged import borders, spread
from sglang_mm.types import Axis, Modality, TokenMap

JUMP = 8
"""Tiles: a tile across a longer gap would meet every tile inside the gap in its window, and show nothing there."""


class Seams(Enum):
    """What tiles do not lie across: nothing, gaps of more than JUMP tiles, borders of blocks of 128 positions."""

    NONE = "none"
    JUMPS = "jumps"
    BLOCKS = "blocks"


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tokens of a shard in some order, cut into tiles of ascending positions.

    index int32 [n]: tokens of the shard; tile t holds index[ptr[t] : ptr[t + 1]], ptr int64 [tiles + 1].
    first, last int64 [tiles]: smallest and largest position. source int64 [tiles]: the list that a tile was cut from,
    ascending.
    """

    index: Tensor
    ptr: Tensor
    first: Tensor
    last: Tensor
    source: Tensor

    def __len__(self) -> int:
        return len(self.first)


class ByList(NamedTuple):
    """Tokens of a shard: list i is index[start[i] : stop[i]], ascending. int64 each.

    List 0 is that of the separators; then one for each class along the frame axis, and one for each along the row axis.
    """

    index: Tensor
    start: Tensor
    stop: Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """positions: int64 [N], ascending, in the prompt of `tokens`, on its device.

    Raises ConfigError for positions that descend, repeat or lie outside the prompt.
    """

    tokens: TokenMap
    positions: Tensor
    _made: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        at = self.positions
        if at.dtype != torch.int64 or at.dim() != 1:
            raise ConfigError(f"positions {at.dtype} {tuple(at.shape)}", "int64 [tokens]", "give one per token")
        inside = not len(at) or (int(at[0]) >= 0 and int(at[-1]) < len(self.tokens))
        if not inside or bool((at[1:] <= at[:-1]).any()):
            given = f"positions {at[:3].tolist()} .. {at[-3:].tolist()}"
            raise ConfigError(given, f"ascending, each once, in 0 .. {len(self.tokens) - 1}", "sort the shard")

    def __len__(self) -> int:
        return len(self.positions)

    def modality(self) -> Tensor:
        """uint8 [N]."""
        return self.once("modality", lambda: self.tokens.modality[self.positions])

    def classes(self, axis: Axis) -> Tensor:
        """int32 [N]: class of each token along `axis`, -1 for none."""
        return self.once(("classes", axis), lambda: self.tokens.classes(axis).of_token[self.positions])

    def holds_block(self) -> Tensor:
        """bool [blocks of the prompt]: whether the shard has a token in that block."""

        def mark() -> Tensor:
            held = self.positions.new_zeros(-(-len(self.tokens) // BLOCK), dtype=torch.bool)
            held[self.positions // BLOCK] = True
            return held

        return self.once("blocks", mark)

    def index_of(self) -> Tensor:
        """int32 [tokens of the prompt + 1]: which token of the shard each one is, -1 for none, and for the one more."""

        def number() -> Tensor:
            index = self.positions.new_full((len(self.tokens) + 1,), -1, dtype=torch.int32)
            index[self.positions] = torch.arange(len(self), dtype=torch.int32, device=index.device)
            return index

        return self.once("index", number)

    def lists(self) -> ByList:
        """The separators of the shard, and the tokens of each class along each axis."""
        return self.once("lists", self._list_tokens)

    def blocks_before(self) -> Tensor:
        """int64 [blocks of the prompt + 1]: how many blocks before each one have a token of the shard."""
        held = self.holds_block()
        return self.once("blocks before", lambda: torch.cat([held.new_zeros(1).long(), torch.cumsum(held, 0)]))

    def slots(self, tile: int) -> Tensor:
        """int64 [X]: the tokens in order, and -1 at both ends and wherever there may be a seam: neighbours belong to
        one tile, unless it is full."""

        def lay() -> Tensor:
            step, block = self.positions.diff(), (self.positions // BLOCK).diff()
            is_seam = (block > 0) | (step > JUMP * tile)
            before = torch.cumsum(torch.cat([is_seam.new_ones(1), is_seam]), 0)
            index = torch.arange(len(self), device=before.device)
            slots = index.new_full((len(self) + 1 + int(before[-1]),), -1)
            slots[index + before[: len(self)]] = index
            return slots

        return self.once(("slots", tile), lay)

    def slot_modality(self, tile: int) -> Tensor:
        """uint8 [X], 255 where there is no token."""

        def look_up() -> Tensor:
            return torch.cat([self.modality(), self.modality().new_full((1,), 255)])[self.slots(tile)]

        return self.once(("slot modality", tile), look_up)

    def slot_classes(self, axis: Axis, tile: int) -> Tensor:
        """int32 [X]: class of each token along `axis`, the number of classes for none: to look up in a table."""

        def look_up() -> Tensor:
            classes, none = self.classes(axis), len(self.tokens.classes(axis))
            return torch.cat([classes.where(classes >= 0, none), classes.new_full((1,), none)])[self.slots(tile)]

        return self.once(("slot classes", axis, tile), look_up)

    def members(self, modality: Modality | None) -> Tensor:
        """int64: tokens of the modality, all for None."""
        if modality is None:
            return torch.arange(len(self), device=self.positions.device)
        return self.once(("members", modality), lambda: (self.modality() == modality).nonzero().flatten())

    def of(self, modality: Modality | None, tile: int, seams: Seams) -> Tiles:
        """The tokens of one modality (None: all), cut into tiles; see `pick`."""
        return self.once((modality, tile, seams), lambda: self.pick(self.members(modality), tile, seams))

    def pick(self, members: Tensor, tile: int, seams: Seams = Seams.NONE) -> Tiles:
        """Tokens of the shard, int64, ascending, cut into tiles of at most `tile`, none across a seam."""
        if seams == Seams.NONE or not len(members):
            ends = torch.arange(0, len(members), tile, device=members.device)
            ptr = torch.cat([ends, ends.new_full((1,), len(members))])
        else:
            at = self.positions.index_select(0, members)
            at, gap = (at // BLOCK, 0) if seams == Seams.BLOCKS else (at, JUMP * tile)
            ptr = cut(at[1:] - at[:-1] > gap, tile)
        return self.tiles(members, ptr, torch.zeros_like(ptr[:-1]))

    def pick_lists(self, members: Tensor, tile: int, lists: Tensor) -> Tiles:
        """The same for several lists of tokens, one after another. lists: int64, ascending, the list of each member."""
        ptr = cut(lists[1:] != lists[:-1], tile) if len(lists) else lists.new_zeros(1)
        return self.tiles(members, ptr, lists[ptr[:-1]])

    def pick_counted(self, members: Tensor, tile: int, counts: Tensor) -> Tiles:
        """The same, given how many tokens each list has: int64 [lists]."""
        ptr = cut_lists(counts, tile)
        ends = torch.cumsum(counts, 0)
        return self.tiles(members, ptr, torch.searchsorted(ends, ptr[:-1], right=True))

    def by_class(self, axis: Axis, tile: int) -> Tiles:
        """Places of frames in order of (item, class, position); source is item * classes + class."""
        return self.once((axis, tile), lambda: self._cut_classes(axis, tile))

    def _list_tokens(self) -> ByList:
        separators = self.tokens.separators[self.positions].nonzero().flatten()
        index, start, stop = [separators], [separators.new_zeros(1)], [separators.new_full((1,), len(separators))]
        for axis in Axis:  # in order of (class, position), those without a class first
            by_class, order = torch.sort(self.classes(axis), stable=True)
            ptr = borders(by_class, len(self.tokens.classes(axis))) + sum(map(len, index))
            index, start, stop = [*index, order], [*start, ptr[:-1]], [*stop, ptr[1:]]
        return ByList(torch.cat(index), torch.cat(start), torch.cat(stop))

    def _cut_classes(self, axis: Axis, tile: int) -> Tiles:
        classes = self.classes(axis).long()
        members = (classes >= 0).nonzero().flatten()
        item = self.tokens.item[self.positions[members]].long()
        lists, order = torch.sort(item * len(self.tokens.classes(axis)) + classes[members], stable=True)
        return self.pick_lists(members[order], tile, lists)

    def tiles(self, members: Tensor, ptr: Tensor, source: Tensor) -> Tiles:
        """The members between neighbours in `ptr`, source: of each tile."""
        ends = torch.cat([ptr[:-1], ptr[1:] - 1])
        first, last = self.positions.index_select(0, members.index_select(0, ends)).chunk(2)
        return Tiles(members.int(), ptr, first, last, source)

    def once(self, key, make):
        """What `make` gives, made at the first call with this key and kept."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def cut(seams: Tensor, tile: int) -> Tensor:
    """int64 [tiles + 1]: borders of tiles of at most `tile` elements, none across a seam.

    seams: bool [n - 1], whether there is one between two of n >= 1 neighbours.
    """
    ends = seams.nonzero().flatten() + 1
    return cut_lists(torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(seams) + 1)]).diff(), tile)


def cut_lists(counts: Tensor, tile: int, total: int | None = None) -> Tensor:
    """int64 [tiles + 1]: borders of tiles of at most `tile` elements in lists that lie side by side.

    counts: int64 [lists], elements of each. total: of `tiles_in`, where the host knows it.
    """
    tiles, ends = tiles_in(counts, tile), torch.cumsum(counts, 0)
    total = int(tiles.sum()) if total is None else total
    before = ends - counts - (torch.cumsum(tiles, 0) - tiles) * tile
    starts = spread(before, tiles, total) + torch.arange(total, device=counts.device) * tile
    return torch.cat([starts, ends[-1:] if len(ends) else ends.new_zeros(1)])


def tiles_in(counts: Tensor, tile: int) -> Tensor:
    """int64: how many tiles each list is cut into."""
    return (counts + tile - 1) // tile
