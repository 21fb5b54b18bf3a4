"""Which rank encodes which frame, and how the frames' embeddings reach the ranks that compute their tokens.

The vision tower's split is independent of the layout: whole frames, evenly. One all-to-all joins the two. Every rank
computes every table from the same integers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.transport import Transport
from sglang_mm.types import BatchLayout, Frame, FrameKey, digest64


def split_frames(frames: Sequence[Frame], ranks: int) -> list[list[int]]:
    """Per rank the indices of the frames it encodes: contiguous, at most one frame above an even share of the tokens.

    A frame goes where its middle token falls when all tokens are dealt out evenly in order. Ranks may stay empty.
    """
    split: list[list[int]] = [[] for _ in range(ranks)]
    stops = list(accumulate(frame.length for frame in frames))
    for index, (frame, stop) in enumerate(zip(frames, stops)):
        split[(2 * stop - frame.length) * ranks // (2 * stops[-1])].append(index)
    return split


@dataclass(frozen=True, eq=False)
class EmbeddingExchange:
    """Tables of one batch. encode: per rank, the (request, frame) pairs to encode, in this order.

    One entry per frame token that lies in its request's new rows, int64: rank source[i] finds it in row place[i] of
    what it encoded; rank owner[i] puts it in row slot[i] of what it computes.
    """

    encode: tuple[tuple[tuple[int, Frame], ...], ...]
    source: Tensor
    place: Tensor
    owner: Tensor
    slot: Tensor

    def sent(self, source: int, owner: int) -> Tensor:
        """int64: rows of the embeddings of rank `source` that go to rank `owner`."""
        return self.place[(self.source == source) & (self.owner == owner)]

    def filled(self, owner: int, source: int) -> Tensor:
        """int64: rows of rank `owner` that those embeddings fill, in the same order."""
        return self.slot[(self.source == source) & (self.owner == owner)]

    def run(self, embeddings: Tensor, transport: Transport) -> tuple[Tensor, Tensor]:
        """Send this rank's frame embeddings to their owners and receive those of this rank's rows.

        embeddings [n, E]: the tokens of encode[rank], frame after frame; [0, E] when there are none. Returns
        (rows int64 [m] on the embeddings' device, values [m, E]): `hidden[rows] = values` fills this rank's rows.
        """
        rank, ranks = transport.rank, range(transport.size)
        tokens = sum(frame.length for _, frame in self.encode[rank])
        if len(embeddings) != tokens:
            given = f"rank {rank}: {len(embeddings)} embeddings"
            raise ConfigError(given, f"{tokens}, one per token of its frames", "encode exactly the frames in `encode`")
        device = embeddings.device
        outgoing = [embeddings[self.sent(rank, owner).to(device)] for owner in ranks]
        rows = [self.filled(rank, source) for source in ranks]
        sizes = [len(filled) for filled in rows]
        values = transport.all_to_all(outgoing, sizes, "exchange of frame embeddings", kind="embeddings")
        return torch.cat(rows).to(device), torch.cat(values)

    def digest(self) -> int:
        """64 bits that differ when any table differs."""
        frames = [len(pairs) for pairs in self.encode]
        return digest64(frames, self.source, self.place, self.owner, self.slot)


def plan_exchange(
    frames: Sequence[Sequence[Frame]], layout: BatchLayout, held: Sequence[Mapping[FrameKey, int]] = ()
) -> EmbeddingExchange:
    """Split the frames of a batch over the layout's ranks and find the way of each token.

    frames: per request, ascending and disjoint. Frames without a token in the new rows are encoded by nobody; one
    that straddles the cached prefix is encoded whole and only its new tokens travel.
    held: per request, frames that a rank encoded before and still holds; it stays theirs, others share the rest.
    Raises ConfigError when frames overlap, or are not given per request.
    """
    _validate(frames, layout)
    encode: list[list[tuple[int, Frame]]] = [[] for _ in range(layout.ranks)]
    new = []
    for request, frame in _needed(frames, layout):
        holder = held[request].get(frame.key) if held else None
        (new if holder is None else encode[holder]).append((request, frame))
    for rank, indices in enumerate(split_frames([frame for _, frame in new], layout.ranks)):
        encode[rank] += [new[i] for i in indices]
    lists = tuple(tuple(pairs) for pairs in encode)
    return EmbeddingExchange(lists, *_ways(lists, layout))


def _needed(frames: Sequence[Sequence[Frame]], layout: BatchLayout) -> Iterator[tuple[int, Frame]]:
    """(request, frame) of every frame with a token in the new rows."""
    for request, (own, rows) in enumerate(zip(frames, layout.requests)):
        for frame in own:
            if frame.stop > rows.start and frame.start < rows.start + rows.length:
                yield request, frame


def _ways(encode: Sequence[Sequence[tuple[int, Frame]]], layout: BatchLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """source, place, owner, slot of every new token of the encoded frames."""
    per_frame = [
        (rank, frame.length, low + frame.start - layout.requests[request].start, low, layout.offsets[request + 1])
        for rank, pairs in enumerate(encode)
        for request, frame in pairs
        for low in [layout.offsets[request]]
    ]
    ranks, lengths, first, low, high = torch.tensor(per_frame, dtype=torch.int64).reshape(-1, 5).T
    frame_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    source = ranks[frame_of]
    place = _count_alike_before(source)
    flat = first[frame_of] + _count_alike_before(frame_of)  # outside [low, high) where the token is cached, or later
    new = (flat >= low[frame_of]) & (flat < high[frame_of])
    owner, slot = _owners(layout)
    return source[new], place[new], owner[flat[new]], slot[flat[new]]


def _owners(layout: BatchLayout) -> tuple[Tensor, Tensor]:
    """For each index into the flat batch: the rank that computes it, and in which of the rank's rows."""
    owner = torch.empty(layout.offsets[-1], dtype=torch.int64)
    slot = torch.empty_like(owner)
    for rank in range(layout.ranks):
        flat = layout.flat(rank)
        owner[flat], slot[flat] = rank, torch.arange(len(flat))
    return owner, slot


def _count_alike_before(ascending: Tensor) -> Tensor:
    return torch.arange(len(ascending)) - torch.searchsorted(ascending, ascending)


def _validate(frames: Sequence[Sequence[Frame]], layout: BatchLayout) -> None:
    if len(frames) != len(layout.requests):
        given, allowed = f"frames of {len(frames)} requests", f"those of all {len(layout.requests)} requests"
        raise ConfigError(given, allowed, "pass an empty sequence for a request without media")
    for request, own in enumerate(frames):
        for frame, following in pairwise(own):
            if following.start < frame.stop:
                given = f"request {request}: {following} after {frame}"
                raise ConfigError(given, f"a frame that starts at {frame.stop} or later", "sort them by position")
