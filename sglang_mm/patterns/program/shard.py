"""Some tokens of one prompt, one rank's rows or one piece of keys, and how they are cut into tiles.

Nothing here depends on a head: a shard is made once per request and serves every layer. N tokens of the shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import BLOCK
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
        return self._once("modality", lambda: self.tokens.modality[self.positions])

    def classes(self, axis: Axis) -> Tensor:
        """int32 [N]: class of each token along `axis`, -1 for none."""
        return self._once(("classes", axis), lambda: self.tokens.classes(axis).of_token[self.positions])

    def holds_block(self) -> Tensor:
        """bool [blocks of the prompt]: whether the shard has a token in that block."""

        def mark() -> Tensor:
            held = self.positions.new_zeros(-(-len(self.tokens) // BLOCK), dtype=torch.bool)
            held[self.positions // BLOCK] = True
            return held

        return self._once("blocks", mark)

    def separator_members(self) -> Tensor:
        """int64, ascending: the separators of the shard."""
        return self._once("separators", lambda: self.tokens.separators[self.positions].nonzero().flatten())

    def class_members(self, axis: Axis, classes: Sequence[int]) -> list[Tensor]:
        """int64, ascending each: the tokens of each of the classes along `axis`."""
        order, ptr = self._once(("by class", axis), lambda: self._order_by_class(axis))
        return [order[ptr[number] : ptr[number + 1]] for number in classes]

    def blocks_before(self) -> Tensor:
        """int64 [blocks of the prompt + 1]: how many blocks before each one have a token of the shard."""
        held = self.holds_block()
        return self._once("blocks before", lambda: torch.cat([held.new_zeros(1).long(), torch.cumsum(held, 0)]))

    def in_classes(self, axis: Axis, classes: Tensor) -> Tensor:
        """bool [N]: tokens whose class along `axis` is among `classes`."""
        chosen = torch.zeros(len(self.tokens.classes(axis)) + 1, dtype=torch.bool, device=self.positions.device)
        chosen[classes] = True
        none = len(chosen) - 1  # looked up by tokens without a class
        index = self._once(("index", axis), lambda: self.classes(axis).where(self.classes(axis) >= 0, none))
        return chosen.index_select(0, index)

    def members(self, modality: Modality | None) -> Tensor:
        """int64: tokens of the modality, all for None."""
        if modality is None:
            return torch.arange(len(self), device=self.positions.device)
        return self._once(("members", modality), lambda: (self.modality() == modality).nonzero().flatten())

    def of(self, modality: Modality | None, tile: int, seams: Seams) -> Tiles:
        """The tokens of one modality (None: all), cut into tiles; see `pick`."""
        return self._once((modality, tile, seams), lambda: self.pick(self.members(modality), tile, seams))

    def pick(self, members: Tensor, tile: int, seams: Seams = Seams.NONE) -> Tiles:
        """Tokens of the shard, int64, ascending, cut into tiles of at most `tile`, none across a seam."""
        if seams == Seams.NONE or not len(members):
            ends = torch.arange(0, len(members), tile, device=members.device)
            ptr = torch.cat([ends, ends.new_tensor([len(members)])])
        else:
            at = self.positions.index_select(0, members)
            at, gap = (at // BLOCK, 0) if seams == Seams.BLOCKS else (at, JUMP * tile)
            ptr = cut(at[1:] - at[:-1] > gap, tile)
        return self._tiles(members, ptr, torch.zeros_like(ptr[:-1]))

    def pick_lists(self, members: Tensor, tile: int, lists: Tensor) -> Tiles:
        """The same for several lists of tokens, one after another. lists: int64, ascending, the list of each member."""
        ptr = cut(lists[1:] != lists[:-1], tile) if len(lists) else lists.new_zeros(1)
        return self._tiles(members, ptr, lists[ptr[:-1]])

    def by_class(self, axis: Axis, tile: int) -> Tiles:
        """Places of frames in order of (item, class, position); source is item * classes + class."""
        return self._once((axis, tile), lambda: self._cut_classes(axis, tile))

    def _order_by_class(self, axis: Axis) -> tuple[Tensor, list[int]]:
        """int64: tokens in order of (class, position), those without a class first; where each class starts."""
        count = len(self.tokens.classes(axis))
        by_class, order = torch.sort(self.classes(axis), stable=True)
        starts = torch.searchsorted(by_class, torch.arange(count + 1, dtype=torch.int32, device=by_class.device))
        return order, starts.tolist()

    def _cut_classes(self, axis: Axis, tile: int) -> Tiles:
        classes = self.classes(axis).long()
        members = (classes >= 0).nonzero().flatten()
        item = self.tokens.item[self.positions[members]].long()
        lists, order = torch.sort(item * len(self.tokens.classes(axis)) + classes[members], stable=True)
        return self.pick_lists(members[order], tile, lists)

    def _tiles(self, members: Tensor, ptr: Tensor, source: Tensor) -> Tiles:
        first, last = self.positions[members[ptr[:-1]]], self.positions[members[ptr[1:] - 1]]
        return Tiles(members.int(), ptr, first, last, source)

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def cut(seams: Tensor, tile: int) -> Tensor:
    """int64 [tiles + 1]: borders of tiles of at most `tile` elements, none across a seam.

    seams: bool [n - 1], whether there is one between two of n >= 1 neighbours.
    """
    ends = seams.nonzero().flatten() + 1
    starts, ends = torch.cat([ends.new_zeros(1), ends]), torch.cat([ends, ends.new_tensor([len(seams) + 1])])
    tiles = (ends - starts + tile - 1) // tile
    return torch.cat([spread(starts, tiles) + nth(tiles) * tile, ends[-1:]])


def spread(values: Tensor, counts: Tensor) -> Tensor:
    """values[i], counts[i] times."""
    return values.repeat_interleave(counts)


def nth(counts: Tensor) -> Tensor:
    """int64: 0 .. counts[0] - 1, then 0 .. counts[1] - 1, and so on."""
    total = torch.cumsum(counts, 0)
    return torch.arange(int(total[-1]) if len(total) else 0, device=counts.device) - spread(total - counts, counts)
