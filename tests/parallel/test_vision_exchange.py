"""Frames are encoded by one rank each, and every token's embedding reaches the row that computes it."""

from itertools import chain

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.local import run_ranks
from sglang_mm.parallel.vision import plan_exchange, split_frames
from sglang_mm.types import BatchLayout, Frame, Run

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
WIDTH = 6


def frames_of(start: int, length: int, count: int, item: int = 0) -> list[Frame]:
    return [Frame(item, i, start + i * length, length) for i in range(count)]


def requests() -> list[tuple[list[Run], list[Frame]]]:
    """A video, a prompt of text, images of several sizes, and a cached prefix that ends inside a frame."""
    video = [Run(0, 9), Run(9, 70 * 33, 70, "video"), Run(9 + 70 * 33, 21)], frames_of(9, 33, 70)
    images = [Run(0, 400)], [Frame(0, 0, 3, 90), Frame(1, 0, 100, 7), Frame(2, 0, 107, 1), Frame(3, 0, 200, 200)]
    cached = [Run(100, 20), Run(120, 4 * 40, 4, "video"), Run(280, 5)], frames_of(0, 40, 7)
    return [video, ([Run(0, 50)], []), images, cached]


def embedding(request: int, position: torch.Tensor) -> torch.Tensor:
    """[n, WIDTH]: a value of its own for each token of the batch."""
    return (request * 10_000 + position.double()).unsqueeze(-1) + torch.arange(WIDTH) / 8


def filled(transport, exchange, layout: BatchLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """What one rank holds after the exchange (NaN where nothing came), and how often each row was filled."""
    own = exchange.encode[transport.rank]
    encoded = [embedding(request, torch.arange(frame.start, frame.stop)) for request, frame in own]
    rows, values = exchange.run(torch.cat([torch.empty(0, WIDTH, dtype=torch.float64), *encoded]), transport)
    hidden = torch.full((layout.rows(transport.rank), WIDTH), float("nan"), dtype=torch.float64)
    hidden[rows] = values
    return hidden, torch.bincount(rows, minlength=len(hidden))


def wanted(layout: BatchLayout, frames: list[list[Frame]], rank: int) -> torch.Tensor:
    parts = []
    for request, own in enumerate(layout.requests):
        media = torch.zeros(own.start + own.length, dtype=torch.bool)
        for frame in frames[request]:
            media[frame.start : frame.stop] = True
        rows = own.rows[rank]
        parts.append(embedding(request, rows).masked_fill(~media[rows].unsqueeze(-1), float("nan")))
    return torch.cat(parts)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_token_arrives_once_with_its_value(ranks):
    layout = BatchLayout(tuple(make_layout(runs, ranks) for runs, _ in requests()))
    frames = [own for _, own in requests()]
    exchange = plan_exchange(frames, layout)
    for rank, (hidden, times) in enumerate(run_ranks(lambda t: filled(t, exchange, layout), ranks)):
        expected = wanted(layout, frames, rank)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(times == 1, ~expected[:, 0].isnan()) and times.max() <= 1


def test_cached_frames_are_encoded_by_nobody_and_a_cut_frame_whole():
    layout = BatchLayout((make_layout([Run(100, 20), Run(120, 185)], 2),))
    exchange = plan_exchange([frames_of(0, 40, 7)], layout)
    assert sorted(frame.index for pairs in exchange.encode for _, frame in pairs) == [2, 3, 4, 5, 6]
    assert len(exchange.source) == 280 - 100, "of the cut frame only the new half travels"


def test_frames_behind_the_new_rows_wait_for_their_chunk():
    layout = BatchLayout((make_layout([Run(0, 60)], 2),))
    exchange = plan_exchange([frames_of(0, 40, 7)], layout)
    assert sorted(frame.index for pairs in exchange.encode for _, frame in pairs) == [0, 1]
    assert len(exchange.source) == 60


def test_a_batch_without_media_exchanges_nothing():
    layout = BatchLayout((make_layout([Run(0, 60)], 3),))
    exchange = plan_exchange([[]], layout)
    for rows, values in run_ranks(lambda t: exchange.run(torch.empty(0, WIDTH), t), 3):
        assert rows.shape == (0,) and values.shape == (0, WIDTH)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_equal_frames_are_split_evenly(ranks):
    for count in (0, 1, ranks - 1, ranks, 10, 333):
        split = split_frames(frames_of(5, 33, count), ranks)
        assert list(chain(*split)) == list(range(count)) and len(split) == ranks
        assert max(map(len, split)) == -(-count // ranks)


def test_digest_sees_another_split():
    def digest(ranks, frames):
        return plan_exchange([frames], BatchLayout((make_layout([Run(0, 400)], ranks),))).digest()

    frames = frames_of(0, 40, 10)
    assert digest(2, frames) == digest(2, list(frames))
    assert len({digest(2, frames), digest(3, frames), digest(2, frames[:-1]), digest(2, frames_of(0, 20, 20))}) == 4


def test_what_cannot_work_is_refused():
    layout = BatchLayout((make_layout([Run(0, 60)], 2),))
    with pytest.raises(ConfigError, match="a frame that starts at 40 or later"):
        plan_exchange([[Frame(0, 0, 0, 40), Frame(0, 1, 39, 10)]], layout)
    with pytest.raises(ConfigError, match="an empty sequence for a request without media"):
        plan_exchange([], layout)
    exchange = plan_exchange([frames_of(0, 30, 2)], layout)
    with pytest.raises(ConfigError, match="30, one per token of its frames"):
        run_ranks(lambda t: exchange.run(torch.empty(29, WIDTH), t), 2)
