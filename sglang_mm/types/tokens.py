"""What each token of one prompt is: modality, media item, frame, place inside the frame. Built once per request.

S tokens. A video of 2 frames of 2 x 3 places with a newline after each row, between two texts:

    token      t t  p p p n p p p n  p p p n p p p n  t          t text, p place of a frame, n newline
    modality   T T  V V V V V V V V  V V V V V V V V  T
    frame     -1-1  0 0 0 0 0 0 0 0  1 1 1 1 1 1 1 1 -1
    place     -1-1  0 1 2-2 3 4 5-2  0 1 2-2 3 4 5-2 -1          row * width + column; Place.NEWLINE = -2
    col       -1-1  0 1 2-1 0 1 2-1  0 1 2-1 0 1 2-1 -1
    span       0 0  1 1 1 1 1 1 1 1  1 1 1 1 1 1 1 1  2

Classes are coordinates (frame axis: place, row axis: column), not positions modulo a stride: for frames of one size
they are the same lines as the paper's (MMInference, Algorithm 1), and they stay right where frames are unevenly apart.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError


class Modality(IntEnum):
    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class Place(IntEnum):
    """What a token that is no place of a frame is; `TokenMap.place` holds these, or the place (>= 0)."""

    TEXT = -1
    NEWLINE = -2  # after a row of a frame
    END_OF_FRAME = -3
    VISION_START = -4
    VISION_END = -5
    TIMESTAMP = -6  # text that says when the next frame was taken


class Axis(StrEnum):
    """Along what a grid's lines repeat: every frame (a class per place) or every row of a frame (one per column)."""

    FRAME = "frame"
    ROW = "row"


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of one axis. Frames of one (height, width) share a name space of classes, others have their own.

    of_token: int32 [S], -1 for tokens that are no place of a frame. Name space n holds the classes
    [starts[n], starts[n + 1]); spaces: int64 [classes], the name space of each class. counts: int64 [classes], tokens.
    """

    of_token: Tensor
    starts: tuple[int, ...]
    counts: Tensor

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def spaces(self) -> Tensor:
        sizes = torch.tensor(self.starts, device=self.of_token.device).diff()
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)


COLUMNS = ("modality", "item", "frame", "place", "col", "span")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """One entry per token of the prompt, on one device.

    modality uint8 [S]; item int32 [S], index of the media item, -1 for text; frame int32 [S], index inside the item, -1
    for text; place int32 [S], row * width + column, or a Place; col int32 [S], -1 off the grid; span int32 [S],
    ascending from 0: a stretch of one modality, and of one item unless it is text. A short text between two frames of
    one video belongs to the video's span, modality and item. grids: (rows, columns) of the frames of each item.
    """

    modality: Tensor
    item: Tensor
    frame: Tensor
    place: Tensor
    col: Tensor
    span: Tensor
    grids: tuple[tuple[int, int], ...]

    def __post_init__(self):
        sizes = [len(getattr(self, name)) for name in COLUMNS]
        if len(set(sizes)) != 1 or not sizes[0]:
            raise ConfigError(f"columns of {sizes} tokens", "one entry per token, one token or more", "rebuild the map")

    def __len__(self) -> int:
        return len(self.modality)

    def to(self, device: torch.device | str) -> "TokenMap":
        """The same map on another device."""
        return TokenMap(*(getattr(self, name).to(device) for name in COLUMNS), self.grids)

    @property
    def separators(self) -> Tensor:
        """bool [S]: newlines, ends of frames, vision start and end, timestamps. Every grid attends to them."""
        return self.place < Place.TEXT

    @cached_property
    def modalities(self) -> tuple[Modality, ...]:
        """Those that occur, in order of their numbers."""
        return tuple(Modality(number) for number in torch.unique(self.modality).tolist())

    @cached_property
    def tail(self) -> int:
        """Where the text after the last media item starts; S if the prompt ends with media, or has none."""
        media = (self.modality != Modality.TEXT).nonzero()
        return int(media[-1]) + 1 if len(media) else len(self)

    def classes(self, axis: Axis) -> Classes:
        """The classes along `axis`, built once."""
        return self._frame_classes if axis == Axis.FRAME else self._row_classes

    @cached_property
    def _frame_classes(self) -> Classes:
        return self._make_classes(Axis.FRAME)

    @cached_property
    def _row_classes(self) -> Classes:
        return self._make_classes(Axis.ROW)

    def _make_classes(self, axis: Axis) -> Classes:
        shapes = sorted(set(self.grids))
        sizes = [rows * cols if axis == Axis.FRAME else cols for rows, cols in shapes]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        first = torch.tensor([int(starts[shapes.index(grid)]) for grid in self.grids] or [0], device=self.item.device)
        local = self.place if axis == Axis.FRAME else self.col
        of_token = torch.where(local >= 0, local + first[self.item.clamp(min=0).long()], -1).int()
        counts = torch.bincount(of_token[of_token >= 0], minlength=int(starts[-1]))
        return Classes(of_token, tuple(starts.tolist()), counts)

    def probe_rows(self, modality: Modality | None, rows: int = 64) -> Tensor:
        """int64, ascending: the last rows of the modality's last span (None: of the prompt), at most `rows`.

        Raises ConfigError for a modality that does not occur.
        """
        if modality is None:
            return torch.arange(max(0, len(self) - rows), len(self))
        here = (self.modality == modality).nonzero().flatten()
        if not len(here):
            raise ConfigError(f"probe rows of {modality.name.lower()}", f"{self.modalities}", "ask for one that occurs")
        last = here[self.span[here] == self.span[here[-1]]]
        return last[-rows:].cpu()
