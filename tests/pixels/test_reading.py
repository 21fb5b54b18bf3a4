"""What is told while a video is read: how far it is, to listeners and in the log, not too often."""

import logging
import time

import pytest

from sglang_mm.events import EventHub, Publisher, Reading, Subscriber, reading
from sglang_mm.events.messages import MediaProgress
from sglang_mm.launch.monitor_board import Board
from sglang_mm.launch.monitor_views import reading_columns
from sglang_mm.pixels import PatchStore
from sglang_mm.tiny import write_checkpoint, write_video
from tests.pixels.processing import processed, processing, request

PATIENCE_S = 30


@pytest.fixture
def told():
    """(a publisher, its hub's subscriber)"""
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        telling = Publisher(hub.ranks_address)
        yield telling, subscriber
        telling.close()


def until_the_end(subscriber: Subscriber) -> list[MediaProgress]:
    heard = []
    while not (heard and heard[-1].ended):
        heard.append(subscriber.receive(PATIENCE_S))
        assert isinstance(heard[-1], MediaProgress)
    return heard


def slowly(count: int, each_s: float):
    for i in range(count):
        time.sleep(each_s)
        yield [i, i]


def test_events_and_lines_are_throttled(told, monkeypatch, caplog):
    monkeypatch.setattr(reading, "MEDIA_EVERY_S", 0.1)
    monkeypatch.setattr(reading, "LOG_EVERY_S", 0.25)
    telling, subscriber = told
    with caplog.at_level(logging.INFO, reading.logger.name), Reading("a", 1, 80, telling) as mine:
        assert len(list(mine.follow(slowly(40, 0.02)))) == 40
    took = until_the_end(subscriber)
    first, *middle, last = took
    assert (first.done, first.ended, last.done, last.frames, last.medium) == (0, False, 80, 80, 1)
    assert 2 <= len(middle) <= last.seconds / 0.1
    assert [message.done for message in took] == sorted(message.done for message in took)
    *lines, end = caplog.messages
    assert 1 <= len(lines) <= last.seconds / 0.25 and end == "request a, video 2: 80 of 80 frames: read"
    assert all(" s so far, " in line and line.startswith("request a, video 2: ") for line in lines)


def test_a_short_read_has_no_line(told, caplog):
    telling, subscriber = told
    with caplog.at_level(logging.INFO, reading.logger.name), Reading("a", 0, 4, telling) as mine:
        list(mine.follow(slowly(2, 0)))
    assert [message.done for message in until_the_end(subscriber)] == [0, 4] and caplog.messages == []


def test_a_failure_is_told(told):
    telling, subscriber = told
    with pytest.raises(OSError, match="cut short"), Reading("a", 0, 4, telling) as mine:
        for _ in mine.follow(slowly(2, 0)):
            raise OSError("cut short")
    last = until_the_end(subscriber)[-1]
    assert (last.done, last.error) == (0, "OSError: cut short")
    assert Board().apply(last) == [f"a  video 1 failed after {last.seconds:.1f} s: OSError: cut short"]


def test_the_processor_tells_and_the_board_shows(told, monkeypatch, tmp_path):
    telling, subscriber = told
    checkpoint = str(write_checkpoint(tmp_path / "tiny"))
    video = str(write_video(tmp_path / "v.mp4", seconds=8, width=160, height=96))
    monkeypatch.setattr(reading, "publisher", lambda: telling)
    monkeypatch.setattr(reading, "MEDIA_EVERY_S", 0.0)
    with processing(checkpoint) as make, PatchStore(tmp_path) as store:
        from sglang_mm.serving import sampling

        monkeypatch.setattr(sampling, "PIECE_BYTES", 4 * 160 * 96 * 3)
        processed(make(store), request(videos=[video, video], rid="mine"))
    board, shown, ended = Board(), [], 0
    while ended < 2:
        message = subscriber.receive(PATIENCE_S)
        assert board.apply(message) == [] and message.request == "mine"
        ended += message.ended
        shown += [reading_columns(one) for one in board.reading.values()]
    assert board.reading == {}
    assert {name for name, *_ in shown} == {"mine"}
    assert {columns[1] for columns in shown} == {"video 1, 16 frames", "video 2, 16 frames"}
    assert {"  0%", " 25%", " 50%", " 75%"} <= {columns[2] for columns in shown}
