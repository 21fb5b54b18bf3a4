"""What the monitor shows of the ranks themselves: heartbeats, faults, losses, and how long they wait."""

import re
import time

from sglang_mm.events import EventHub, Publisher, Vitals
from sglang_mm.events.messages import Fault, Heartbeat, RankLost, StageWaited, Straggler, Verdict
from sglang_mm.launch.monitor_board import Board
from tests.launch.monitoring import end_of, ended, start, started


def test_ranks_that_live_wait_fail_and_are_lost():
    board = Board()
    beats = [Heartbeat(rank=0, waits_for=[1], waits_s=3.4), Heartbeat(rank=1), Heartbeat(rank=2)]
    for message in beats:
        assert board.apply(message) == []
    assert board.health.cells() == ["0: 0.0 s, waits 3 s for 1", "1: 0.0 s", "2: 0.0 s"] and board.health.missed() == []
    board.health.beats[1] = beats[1], time.monotonic() - 2.1
    assert board.health.missed() == [1] and board.health.cells()[1] == "1: 2.1 s!"
    assert board.apply(RankLost(rank=2, reason="exit code -9")) == ["rank 2 was lost: exit code -9"]
    assert board.health.missed() == [1, 2] and board.health.cells()[2] == "2: lost"
    assert board.apply(Fault(rank=0, what="own", reason="E: x")) == ["rank 0 failed: E: x"]
    verdict = Verdict(rank=2, what="gone", reason="exit code -9", layer=3, node="b")
    assert board.apply(verdict) == ["the cause is rank 2 (layer 3, node b): exit code -9"]
    assert board.apply(verdict) == [], "told once"
    (line,) = board.apply(Straggler(prefill="0:a", rank=1, ranks=3, share=0.02, others=0.4, prefills=3))
    assert line == "rank 1 is slow: it waited 2% of its prefill, the others 40%; 3 prefills in a row"


def test_heartbeats_are_lines_beside_a_prefill():
    with EventHub() as hub:
        telling, who = Publisher(hub.ranks_address), Vitals()
        who.start(1, address=hub.control_address)
        telling.emit(started(0))
        running = start("--events", hub.address, "--requests", "1")
        while not (line := running.stdout.readline()).startswith("alive"):
            assert line
        assert re.fullmatch(r"alive  1: \d\.\d s\n", line)
        for message in (started(1), ended(0), ended(1)):
            telling.emit(message)
        assert end_of(running)[::2] == (0, "")
        who.stop()
        telling.close()


def test_stragglers_as_tables():
    waited = [(40, 4.0, [30, 9, 0, 1]), (40, 0.2, [40, 0, 0, 0]), (40, 4.4, [30, 9, 0, 1])]
    edges = [0.0003, 0.1, 3.0]
    with EventHub() as hub:
        ranks = [Vitals() for _ in waited]
        for rank, (who, (count, seconds, bins)) in enumerate(zip(ranks, waited)):
            stage = StageWaited(count, seconds, seconds / 2, bins)
            who.follow(lambda: None, lambda stage=stage: {"ring hop": stage}, edges)
            who.rested()
            who.start(rank, "b", hub.control_address)
        code, out, errors = end_of(start("--events", hub.address, "--stragglers", "--timeout", "0.5"))
        assert (code, errors) == (0, "")
        head, *lines = [line.split() for line in out.splitlines()]
        assert head == ["ring", "hop", "waits", "seconds", "longest", "<=0.3", "ms", "<=100", "ms", "longer"]
        assert lines[0] == ["rank", "0", "b", "40", "4.00", "2.000", "30", "9", "1"]
        assert " ".join(lines[1]) == "rank 1 b 40 0.20 0.100 40 0 0 the others wait for it"
        assert lines[2][-1] == "1" and len(lines) == 3
        for who in ranks:
            who.stop()


def test_no_waits_are_said_to_be_none():
    with EventHub() as hub:
        out = end_of(start("--events", hub.address, "--stragglers", "--timeout", "0.3"))
    assert out == (0, "no rank has told how long it waited\n", "")
