"""Which rank computes which row: long runs in zigzag pieces, short runs token by token.

A long run (at least 256 tokens per rank) is cut into 2C pieces; rank r takes piece r and piece 2C-1-r, an early and a
late one, so rows and attended (query, key) pairs are both even. Short runs (questions, timestamps, a small image) go
around the ranks like a snake. C = 4, a video between two texts:

    position  0        32                                                        2080     2112
              | text    | video                                                    | text   |
    rank      01233210.. 0000000 1111111 2222222 3333333 3333333 2222222 1111111 0000000 01233210..

Every rank computes the same table from the same runs; `Layout.digest()` proves that it did.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.types import Layout, Run

LONG_RUN = 256  # tokens per rank from which a run is cut in pieces
MANY_FRAMES = 40  # frames per rank from which cuts may keep to frame borders
COARSEST_CUT = 128  # original positions: the query tile of the GPU kernels
CUT_ROUNDING = 100  # a piece is at least this many cut granules long: rounding moves its length by 1% at most
FRAME_IMBALANCE = 1.03  # slowest / mean rank of one run beyond which frame borders are given up
STRIPED = -1


def make_layout(runs: Sequence[Run], ranks: int) -> Layout:
    """Lay the new rows of one request over `ranks` ranks.

    runs: the new rows in order, without holes; a cached prefix is what lies before the first one.
    Slowest / mean rank stays within 1.05, in rows and in attended pairs, for 256 * ranks new rows or more.
    Raises ConfigError for ranks < 1, no runs, or runs that do not follow one another.
    """
    _validate(runs, ranks)
    start, length = runs[0].start, runs[-1].stop - runs[0].start
    lengths, owners = torch.tensor([piece for run in runs for piece in _pieces(run, ranks)]).T
    owner = owners.repeat_interleave(lengths)
    striped = owner == STRIPED
    owner[striped] = _snake(int(striped.sum()), ranks)
    rows = tuple((owner == rank).nonzero().flatten() + start for rank in range(ranks))
    return Layout(start, length, rows)


def _validate(runs: Sequence[Run], ranks: int) -> None:
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks", ">= 1", "pass the context-parallel width")
    if not runs:
        raise ConfigError("no runs", "at least one run", "do not lay out a request without new tokens")
    for run, following in pairwise(runs):
        if following.start != run.stop:
            given = f"{following} after {run}"
            raise ConfigError(given, f"a run that starts at {run.stop}", "tile the new rows in order")


def _pieces(run: Run, ranks: int) -> list[tuple[int, int]]:
    """(tokens, rank) of each piece of one run; a short run is one piece whose rank is STRIPED."""
    if run.length < LONG_RUN * ranks:
        return [(run.length, STRIPED)]
    cuts = _cuts(run, ranks)
    return [(stop - first, _zigzag(i, ranks)) for i, (first, stop) in enumerate(pairwise(cuts))]


def _zigzag(piece: int, ranks: int) -> int:
    return min(piece, 2 * ranks - 1 - piece)


def _cuts(run: Run, ranks: int) -> list[int]:
    """2C + 1 ascending positions: on frame borders where there are many frames and balance allows, else fine ones."""
    if run.frames >= MANY_FRAMES * ranks:
        cuts = _round_cuts(run, ranks, run.start, run.length // run.frames)
        if _imbalance(cuts, ranks) <= FRAME_IMBALANCE:
            return cuts
    return _round_cuts(run, ranks, 0, _granule(run.length, ranks))


def _granule(length: int, ranks: int) -> int:
    """The largest power of two that is at most COARSEST_CUT and 1% of a piece."""
    finest = max(1, length // (2 * ranks * CUT_ROUNDING))
    return min(COARSEST_CUT, 1 << (finest.bit_length() - 1))


def _round_cuts(run: Run, ranks: int, origin: int, granule: int) -> list[int]:
    """Equal pieces of the run, each inner cut moved to the nearest origin + k * granule."""
    pieces = 2 * ranks
    inner = []
    for i in range(1, pieces):
        ideal = (run.start - origin) * pieces + run.length * i  # in 1/pieces of a position after the origin
        inner.append(origin + (2 * ideal + granule * pieces) // (2 * granule * pieces) * granule)
    return [run.start, *inner, run.stop]


def _imbalance(cuts: list[int], ranks: int) -> float:
    """Slowest / mean rank of one zigzag run, the worse of rows and attended pairs."""
    rows, pairs = [0] * ranks, [0] * ranks
    for i, (first, stop) in enumerate(pairwise(cuts)):
        rows[_zigzag(i, ranks)] += stop - first
        pairs[_zigzag(i, ranks)] += (stop - first) * (first + stop + 1) // 2
    return max(max(load) * ranks / sum(load) for load in (rows, pairs))


def _snake(tokens: int, ranks: int) -> Tensor:
    """int64 [tokens]: 0..C-1, C-1..0, 0..C-1, and so on."""
    turn = torch.arange(tokens) % (2 * ranks)
    return torch.minimum(turn, 2 * ranks - 1 - turn)
