"""Which token is computed where: runs, frames and layouts. Integers only.

Positions are indices into one whole prompt, cached prefix included; causality is decided by them and nothing else.
A request's new rows are [start, start + length); start > 0 when a cached prefix exists.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError

FrameKey = tuple[int, int]
"""(media item, frame of that item)"""


@dataclass(frozen=True)
class Run:
    """A stretch [start, start + length) of one prompt that the layout treats alike.

    frames > 1: a video of equally long frames. Raises ConfigError when the frames do not divide the length.
    """

    start: int
    length: int
    frames: int = 1
    modality: str = "text"

    def __post_init__(self):
        if self.start < 0 or self.length < 1 or self.frames < 1:
            raise ConfigError(f"{self}", "start >= 0, length >= 1, frames >= 1", "leave empty runs out")
        if self.length % self.frames:
            raise ConfigError(f"{self}", "a length that is a multiple of frames", "split a cut frame into its own run")

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Frame:
    """What the vision tower encodes at once: frame `index` of media `item`, prompt tokens [start, start + length)."""

    item: int
    index: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def key(self) -> FrameKey:
        """What tells it from the other frames of its request."""
        return self.item, self.index


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rank computes which new row of one request.

    rows: per rank, int64 CPU, ascending positions; together each of [start, start + length) exactly once.
    """

    start: int
    length: int
    rows: tuple[Tensor, ...]

    def __post_init__(self):
        held = sum(len(rows) for rows in self.rows)
        if held != self.length:
            raise ConfigError(f"ranks with {held} rows in all", f"{self.length} rows", "give every row to one rank")

    @property
    def ranks(self) -> int:
        return len(self.rows)

    def owner(self) -> Tensor:
        """int64 [length]: the rank that computes position start + i."""
        return self._scatter(torch.full_like(rows, rank) for rank, rows in enumerate(self.rows))

    def slot(self) -> Tensor:
        """int64 [length]: where position start + i lies among its owner's rows."""
        return self._scatter(torch.arange(len(rows)) for rows in self.rows)

    def attended_pairs(self) -> list[int]:
        """Per rank, (query, key) pairs of dense causal attention: the row at position p attends p + 1 keys."""
        return [int(rows.sum()) + len(rows) for rows in self.rows]

    def digest(self) -> int:
        """64 bits that differ when any rank's rows differ."""
        return digest64([self.start, self.length, self.ranks, *map(len, self.rows)], *self.rows)

    def _scatter(self, values: Iterable[Tensor]) -> Tensor:
        table = torch.empty(self.length, dtype=torch.int64)
        for rows, value in zip(self.rows, values, strict=True):
            table[rows - self.start] = value
        return table


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Several requests at once: a rank holds its rows of request 0, then of request 1, and so on."""

    requests: tuple[Layout, ...]

    def __post_init__(self):
        if len({layout.ranks for layout in self.requests}) != 1:
            given = [layout.ranks for layout in self.requests]
            raise ConfigError(f"layouts for {given} ranks", "one or more, all for the same ranks", "rebuild them")

    @property
    def ranks(self) -> int:
        return self.requests[0].ranks

    @cached_property
    def offsets(self) -> list[int]:
        """Where each request's new rows start in the flat batch; one more entry, the end."""
        return [0, *accumulate(layout.length for layout in self.requests)]

    def rows(self, rank: int) -> int:
        return sum(len(layout.rows[rank]) for layout in self.requests)

    def segments(self, rank: int) -> list[slice]:
        """One slice of the rank's rows per request; empty where the rank has none."""
        ends = [0, *accumulate(len(layout.rows[rank]) for layout in self.requests)]
        return [slice(first, last) for first, last in pairwise(ends)]

    def flat(self, rank: int) -> Tensor:
        """int64: the rank's rows as indices into the flat batch, in the order in which the rank holds them."""
        held = zip(self.requests, self.offsets)
        return torch.cat([layout.rows[rank] - layout.start + offset for layout, offset in held])

    def digest(self) -> int:
        """64 bits that differ when any request's layout differs."""
        return digest64([layout.digest() for layout in self.requests])


def digest64(numbers: Iterable[object], *tables: Tensor) -> int:
    """A 64-bit fingerprint of numbers or lists, and int64 CPU tables; the same on every machine of one byte order."""
    hashed = hashlib.blake2b(repr(list(numbers)).encode(), digest_size=8)
    for table in tables:
        hashed.update(table.contiguous().numpy())
    return int.from_bytes(hashed.digest(), "little")
