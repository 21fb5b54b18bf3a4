"""`python -m sglang_mm.launch.monitor` as a user runs it, fed by a real hub; its board, event by event."""

import json
import os
import pty
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest

from sglang_mm.demo.server import free_port
from sglang_mm.events import EventHub, Publisher
from sglang_mm.events.messages import (
    MediaProgress,
    RequestRecord,
    StageStarted,
)
from sglang_mm.launch import monitor_board
from sglang_mm.launch.monitor_board import Board
from sglang_mm.launch.monitor_views import columns, printable
from tests.launch.monitoring import PATIENCE_S, end_of, ended, layer, start, started

RECORD = {"schedule": "ring", "ranks": 2, "new_tokens": 31204, "cached_tokens": 5, "tokens": {"text": 42, "image": 0}}
SUMMARY = "a  ring on 2 ranks, 31,204 new tokens (text 42), 5 cached: 3.0 s"


@pytest.fixture
def told():
    """(a hub's address, a publisher to it that has told the start of a prefill on two ranks)"""
    with EventHub() as hub:
        telling = Publisher(hub.ranks_address)
        for message in (started(0), started(1)):
            telling.emit(message)
        yield hub.address, telling
        telling.close()


@contextmanager
def answering(code: int, body: str, key: str = ""):
    """An HTTP server with one answer, for those who have its key; yields its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = not key or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(code if allowed and self.path == "/sglang_mm/status" else 401)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


def test_plain_lines(told):
    address, telling = told
    running = start("--events", address, "--requests", "1")  # not a terminal, so plain
    first = running.stdout.readline()
    assert first.startswith("a  31,204 tokens, ring    0%  starting  layers - - of 4")
    for message in (layer(0, 3), layer(1, 1), ended(0), ended(1, records={"a": RECORD})):
        telling.emit(message)
    code, out, errors = end_of(running)
    assert (code, errors) == (0, "")
    assert out.splitlines()[-1] == SUMMARY


def test_json_lines_are_the_events(told):
    address, telling = told
    running = start("--events", address, "--json", "--once")
    heard = [json.loads(running.stdout.readline()) for _ in range(2)]
    rest = [layer(1, 3), ended(0), ended(1), RequestRecord(request="later", record=RECORD)]
    for message in rest:
        telling.emit(message)
    code, out, _ = end_of(running)
    assert code == 0 and [message["kind"] for message in heard] == ["prefill_started"] * 2
    assert [json.loads(line) for line in out.splitlines()] == [msgspec.to_builtins(message) for message in rest[:3]]


def test_bars_in_a_terminal(told):
    address, telling = told
    outside, inside = pty.openpty()
    running = start("--events", address, "--once", out=inside, COLUMNS="140", TERM="xterm")
    os.close(inside)
    seen = b""
    while b"0%" not in seen:
        seen += os.read(outside, 1 << 16)
    for message in (StageStarted(prefill="0:a", rank=0, stage="layers", seconds=0.0), layer(0, 3), ended(0), ended(1)):
        telling.emit(message)
    try:
        while data := os.read(outside, 1 << 16):
            seen += data
    except OSError:  # the terminal's other end was closed
        pass
    os.close(outside)
    assert end_of(running)[::2] == (0, "")
    assert b"\x1b[" in seen and b"31,204 tokens, ring" in seen
    assert b"a  ring on 2 ranks, 31,204 new tokens, 5 cached: 3.0 s" in seen


def test_the_server_says_where_to_listen(told):
    address, telling = told
    with answering(200, json.dumps({"events": address}), key="secret") as url:
        named = [start("--url", url, "--once", "--api-key", "secret"), start("--url", url, SGLANG_MM_API_KEY="secret")]
        assert [each.stdout.readline()[:17] for each in named] == ["a  31,204 tokens,"] * 2
        telling.emit(RequestRecord(request="b", record=RECORD, finish="length"))
        code, out, _ = end_of(named[0])
        assert code == 0 and out.splitlines()[-1].startswith("b  ring on 2 ranks") and out.endswith(", length\n")
        named[1].send_signal(signal.SIGINT)
        assert end_of(named[1])[::2] == (130, "")
        code, _, errors = end_of(start("--url", url))
        assert code == 1 and "answered 401" in errors and "--api-key" in errors


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, '{"events": null}', "names no event stream"),
        (200, "[]", "names no event stream"),
        (200, "hello", "could not be read"),
        (404, "{}", "answered 404"),
    ],
)
def test_a_server_without_events_is_an_error(code, body, message):
    with answering(code, body) as url:
        assert_fails(start("--url", url), message)


def test_nobody_there_is_an_error():
    both = [start("--url", f"http://127.0.0.1:{free_port()}"), start("--events", f"tcp://127.0.0.1:{free_port()}")]
    assert_fails(both[0], "could not be read (")
    assert_fails(both[1], "no event stream answered within 3 s")


def assert_fails(running: subprocess.Popen, message: str) -> None:
    code, out, errors = end_of(running)
    assert (code, out, errors.count("\n")) == (1, "", 1)
    assert message in errors and "Remedy:" in errors


def test_it_ends_in_time(told):
    address, _ = told
    began = time.monotonic()
    waiting = [start("--events", address, "--timeout", "0.5", *more) for more in ([], ["--requests", "2"])]
    assert end_of(waiting[0])[::2] == (0, "")
    assert end_of(waiting[1])[::2] == (1, "sglang_mm: fewer than 2 requests in 0.5 s\n")
    assert time.monotonic() - began < 20


def test_a_reader_that_goes_away_is_no_error(told):
    address, telling = told
    running = start("--events", address, "--json")
    running.stdout.readline()
    running.stdout.close()
    for _ in range(50):
        telling.emit(started(0))
        time.sleep(0.01)
    assert running.wait(PATIENCE_S) == 0
    assert running.stderr.read() == ""
    running.stderr.close()


def test_late_ranks_and_time_left(monkeypatch):
    monkeypatch.setattr(monitor_board, "LATE_S", 0.2)
    board = Board()
    begin = StageStarted(prefill="0:a", rank=0, stage="layers", seconds=10.0)
    for message in (started(0), begin, layer(0, 0, 40.0)):
        assert board.apply(message) == []
    (prefill,) = board.running.values()
    assert prefill.cells() == ["1", "-"] and prefill.left is None and prefill.done == 0
    time.sleep(0.25)
    assert prefill.late() == [1] and columns(prefill)[5] == "late: rank 1"
    for message in (started(1), msgspec.structs.replace(begin, rank=1), layer(1, 1, 50.0)):
        board.apply(message)
    assert prefill.late() == [0] and prefill.cells() == ["1!", "2"]
    assert prefill.done == 0.25
    # rank 0 took 30 s for a layer and has three to go, the first of which began a moment ago
    assert 88 < prefill.left <= 90


def test_a_batch_has_a_line_per_request():
    board = Board()
    for message in (started(0, requests=("a", "b")), started(1, requests=("a", "b")), ended(0, records={"a": RECORD})):
        assert board.apply(message) == []
    assert board.apply(ended(1)) == [SUMMARY, "b  ring on 2 ranks, 31,204 new tokens, 5 cached: 3.0 s"]
    assert board.running == {} and board.requests == 2
    assert board.apply(RequestRecord(request="a", record=RECORD, finish="stop")) == []  # told already
    assert board.requests == 2


def test_the_first_failure_ends_a_prefill():
    board = Board()
    board.apply(started(0))
    failed = "a  failed on rank 1 after 3.0 s: RingBroken: rank 0"
    assert board.apply(ended(1, error="RingBroken: rank 0")) == [failed]
    assert board.apply(ended(0)) == [] and board.running == {}


def test_a_lost_end_is_made_up_for_by_the_next_prefill():
    board = Board()
    for message in (started(0), started(1), ended(0), started(0, prefill="1:b", requests=("b",))):
        assert board.apply(message) == []
    (line,) = board.apply(started(1, prefill="1:b", requests=("b",)))
    assert line.startswith("a  ring on 2 ranks") and list(board.running) == ["1:b"]


def test_health_checks_are_not_shown():
    board = Board()
    for rank in range(2):
        assert board.apply(started(rank, requests=("HEALTH_CHECK_1",))) == [] and board.running == {}
    assert [board.apply(ended(rank)) for rank in range(2)] == [[], []] and board.requests == 0


def reads(done: int, request: str = "a", **more) -> MediaProgress:
    return MediaProgress(request=request, medium=1, done=done, frames=7200, seconds=20.0, **more)


def test_a_video_that_is_read_is_shown_until_its_prefill(told):
    address, telling = told
    running = start("--events", address, "--requests", "1")
    running.stdout.readline()
    telling.emit(reads(1800, "later"))
    while not (line := running.stdout.readline()).startswith("later"):
        assert line
    assert line == "later  video 2, 7,200 frames   25%  reading  20 s, 60 s left\n"
    for message in (ended(0), ended(1)):
        telling.emit(message)
    assert end_of(running)[::2] == (0, "")


def test_videos_on_the_board():
    board = Board()
    assert board.apply(reads(0)) == board.apply(reads(3600)) == board.apply(reads(5, "b")) == []
    assert [told.done for told in board.reading.values()] == [3600, 5]
    assert board.apply(reads(7200, ended=True)) == [] and list(board.reading) == [("b", 1)]
    board.apply(started(0, requests=("b",)))
    assert board.reading == {}, "its end was not heard of, but its prefill is under way"
    assert board.apply(reads(9, "HEALTH_CHECK_1")) == [] and board.reading == {}
    assert board.apply(reads(9, ended=True, error="E: x")) == ["a  video 2 failed after 20.0 s: E: x"]


def test_odd_events_do_not_stop_it():
    board = Board()
    for message in (ended(5), layer(7, 9), StageStarted(prefill="x", rank=0, stage="?", seconds=0.0)):
        assert board.apply(message) == []
    for message in (started(0), layer(9, 99), layer(0, 99), StageStarted(prefill="0:a", rank=1, stage="?", seconds=0)):
        board.apply(message)
    (prefill,) = board.running.values()
    assert len(columns(prefill)) == 7 and prefill.done == 0
    assert "None on 2 ranks" in board.apply(RequestRecord(request="o", record={"ranks": 2, "tokens": [1]}))[0]


def test_ids_cannot_move_the_cursor():
    assert printable("a\x1b[2J\nb\u202e é") == "a\\x1b[2J\\nb\\u202e é"
