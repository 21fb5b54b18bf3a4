"""From where the frames of a prompt lie to the TokenMap: the one builder that all model families share.

A video of 2 frames of 1 x 3 places that each follow a short text, and an image of 2 x 2; v, e: vision start and end:

    token      t  t  v  p p p  e  t  t  v  p p p  e  t  v  p p p p  e  t
    modality   T  T  T  V V V  V  V  V  V  V V V  T  T  T  I I I I  T  T
    item      -1 -1 -1  0 0 0  0  0  0  0  0 0 0 -1 -1 -1  1 1 1 1 -1 -1
    frame     -1 -1 -1  0 0 0  0  1  1  1  1 1 1 -1 -1 -1  0 0 0 0 -1 -1
    place     -1 -1 -4  0 1 2 -5 -6 -6 -4  0 1 2 -5 -1 -4  0 1 2 3 -5 -1
    span       0  0  0  1 1 1  1  1  1  1  1 1 1  2  2  2  3 3 3 3  4  4

Between two frames of one video, fewer than JOIN_BELOW tokens join the video: a vision end belongs to the frame that it
closes, everything else to the frame that follows. All other text stays text, also the vision start before the first
frame and the end after the last; these have a place of their own, so that every grid attends to them. A text token has
no item and no frame, a media token has both.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.types import Modality, Place, TokenMap

JOIN_BELOW = 64
"""Tokens between two frames of one video, vision end and start among them, that no longer join the video."""


@dataclass(frozen=True)
class Wraps:
    """Token ids right before and right after media. None: the family has none."""

    start: int | None = None
    end: int | None = None


NO_WRAPS = Wraps()


@dataclass(frozen=True, eq=False)
class Item:
    """One image or video: what has frames of one size, at known positions.

    grid: (rows, columns) of a frame. starts int64 [frames], ascending: position of the first token of each frame.
    places int32 [n]: what the n tokens of a frame are, as in `TokenMap.place`. closing: the same for tokens that follow
    the last frame alone. Raises ConfigError for places that are not those of the grid.
    """

    modality: Modality
    grid: tuple[int, int]
    starts: Tensor
    places: Tensor
    closing: tuple[Place, ...] = ()

    def __post_init__(self):
        rows, cols = self.grid
        seen = self.places[self.places >= 0]
        if min(rows, cols) < 1 or not torch.equal(seen, torch.arange(rows * cols, dtype=seen.dtype)):
            raise ConfigError(
                f"a frame of {rows} x {cols} with {len(seen)} places", "rows * columns places", "check the grid"
            )
        if not len(self.starts):
            raise ConfigError(f"a {self.modality.name.lower()} without frames", "one or more", "leave it out")

    @property
    def first(self) -> int:
        return int(self.starts[0])

    @property
    def stop(self) -> int:
        """Behind the last frame and its closing tokens."""
        return int(self.starts[-1]) + len(self.places) + len(self.closing)


@lru_cache(maxsize=256)
def frame_places(rows: int, cols: int, *, newline: bool = False, end: int = 0) -> Tensor:
    """int32: row * cols + col for all places, a newline after each row if asked, then `end` end-of-frame tokens.

    The same arguments give the same tensor: not to be written to.
    """
    places = torch.arange(rows * cols, dtype=torch.int32).view(rows, cols)
    if newline:
        places = torch.nn.functional.pad(places, (0, 1), value=Place.NEWLINE)
    return torch.nn.functional.pad(places.flatten(), (0, end), value=Place.END_OF_FRAME)


def build_token_map(ids: Tensor, items: Sequence[Item], wraps: Wraps = NO_WRAPS) -> TokenMap:
    """The TokenMap of a prompt, on the CPU, in time and memory O(S).

    ids int64 [S], on the CPU: only tokens next to frames are looked at. items: in prompt order.
    Raises ConfigError for items that overlap, are out of order, or lie beyond the prompt.
    """
    _check(len(ids), items)
    columns, groups = _Columns(len(ids)), _grouped(items)
    for group in groups:
        columns.add(group)
    for group in groups:
        columns.wrap(ids, group, wraps)
    # text has item -1: where the item changes, and only there, a span ends
    seams = columns.item.diff(prepend=columns.item[:1]) != 0
    span = seams.cumsum(0, dtype=torch.int32)
    grids = tuple(item.grid for item in items)
    return TokenMap(columns.modality, columns.item, columns.frame, columns.place, columns.col, span, grids)


def _check(length: int, items: Sequence[Item]) -> None:
    reached = 0
    for number, item in enumerate(items):
        name = f"{item.modality.name.lower()} {number}"
        if len(item.starts) > 1 and int(item.starts.diff().min()) < len(item.places):
            raise ConfigError(f"{name}, whose frames of {len(item.places)} tokens overlap", "ascending", "sort them")
        if item.first < reached:
            given = f"{name} at {item.first}, where the one before reaches to {reached}"
            raise ConfigError(given, "media in prompt order that do not overlap", "check the offsets")
        reached = item.stop
        if reached > length:
            raise ConfigError(f"{name} up to {reached}", f"a prompt of {length} tokens", "check the offsets")


@dataclass(frozen=True, eq=False)
class _Group:
    """All frames of items that differ only in where they are.

    starts int64, number and frame int32 [frames of all items]: position, item, index inside the item.
    """

    item: Item
    starts: Tensor
    number: Tensor
    frame: Tensor

    @property
    def tokens(self) -> int:
        return len(self.item.places)

    @property
    def is_last(self) -> Tensor:
        """bool [frames]: no frame of its item follows."""
        return torch.cat([self.number[1:] != self.number[:-1], torch.ones(1, dtype=torch.bool)])


def _grouped(items: Sequence[Item]) -> list[_Group]:
    """Thousands of images of a few sizes are a few groups."""
    alike = defaultdict(list)
    for number, item in enumerate(items):
        alike[item.modality, item.grid, item.closing, id(item.places)].append(number)
    groups = []
    for numbers in alike.values():
        counts = torch.tensor([len(items[number].starts) for number in numbers])
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        number = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(counts)
        frame = (torch.arange(len(before)) - before).int()
        starts = torch.cat([items[number].starts for number in numbers])
        groups.append(_Group(items[numbers[0]], starts, number, frame))
    return groups


class _Columns:
    """The columns of a TokenMap while they are filled, all text at first."""

    def __init__(self, length: int):
        self.modality = torch.full((length,), Modality.TEXT, dtype=torch.uint8)
        self.item = torch.full((length,), -1, dtype=torch.int32)
        self.frame, self.col = self.item.clone(), self.item.clone()
        self.place = torch.full((length,), Place.TEXT, dtype=torch.int32)

    def add(self, group: _Group) -> None:
        """Frames, what closes the last of each item, and short text between them."""
        item, last = group.item, group.is_last
        at = group.starts[:, None] + torch.arange(group.tokens)
        self._fill(at, item, item.places, group.number[:, None], group.frame[:, None])
        self.col[at] = torch.where(item.places >= 0, item.places % item.grid[1], -1)

        stops = group.starts + group.tokens
        between, gap = _short_gaps(stops[:-1], group.starts[1:], ~last[:-1])
        self._fill(between, item, Place.TIMESTAMP, group.number[gap], group.frame[gap] + 1)

        closing = stops[last, None] + torch.arange(len(item.closing))
        places = torch.tensor(item.closing, dtype=torch.int32)
        self._fill(closing, item, places, group.number[last, None], group.frame[last, None])

    def _fill(self, at: Tensor, item: Item, place: Tensor | Place, number: Tensor, frame: Tensor) -> None:
        self.modality[at] = int(item.modality)
        self.place[at] = place if isinstance(place, Tensor) else int(place)
        self.item[at] = number.expand(at.shape)
        self.frame[at] = frame.expand(at.shape)

    def wrap(self, ids: Tensor, group: _Group, wraps: Wraps) -> None:
        """Vision starts right before frames and ends right after: of text, or of text that joined the video."""
        before = group.starts - 1
        after = group.starts + group.tokens + len(group.item.closing) * group.is_last
        for at, token, place in ((before, wraps.start, Place.VISION_START), (after, wraps.end, Place.VISION_END)):
            if token is None:
                continue
            inside = (at >= 0) & (at < len(ids))
            seen, frame = at[inside], group.frame[inside]
            found = (ids[seen] == token) & ((self.place[seen] == Place.TEXT) | (self.place[seen] == Place.TIMESTAMP))
            seen, frame = seen[found], frame[found]
            self.frame[seen] = torch.where(self.item[seen] >= 0, frame, -1)
            self.place[seen] = int(place)


def _short_gaps(low: Tensor, high: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """int64, int64: positions of gaps [low, high) shorter than JOIN_BELOW, and the gap of each. inside: gaps to see."""
    lengths = torch.where(inside & (high - low < JOIN_BELOW), high - low, 0)
    gap = torch.arange(len(lengths)).repeat_interleave(lengths)
    offset = torch.arange(len(gap)) - (lengths.cumsum(0) - lengths)[gap]
    return low[gap] + offset, gap
