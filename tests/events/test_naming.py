"""What a failing rank raises: real processes that beat, wait, fail, are killed and stopped, around one hub."""

import json
import signal
import subprocess
import time
from contextlib import ExitStack

import pytest
import zmq

from sglang_mm.errors import RankMismatch, RingBroken
from sglang_mm.events import CONTROL_ENV, EventHub, Subscriber, Vitals
from sglang_mm.events.asking import ask
from sglang_mm.events.messages import Fault, RankLost, Verdict, encode
from sglang_mm.events.naming import fault_of, named, odd_one_out
from tests.events.telling import PATIENCE_S, end_of, hear, process, wait_until

RANK = """
import json, sys, time
from types import SimpleNamespace
from sglang_mm.errors import RingBroken
from sglang_mm.events.naming import named
from sglang_mm.events.vitals import vitals
rank, address = int(sys.argv[1]), sys.argv[2]
vitals.layers, waits = 28, {"now": None}
vitals.follow(lambda: waits["now"])
vitals.start(rank, f"n{rank}", address)
for line in sys.stdin:
    what, *about = json.loads(line)
    vitals.stage, vitals.layer = "layers", rank
    if what == "wait":
        waits["now"] = SimpleNamespace(ranks=tuple(about), stage="ring hop", since=time.monotonic())
    if what in ("wait", "compute"):
        continue
    waits["now"] = None
    began = time.monotonic()
    error = RingBroken(*about, "ring hop", 2.0) if what == "broken" else MemoryError("no room")
    told = named(error)
    found = [getattr(told, name, None) for name in ("rank", "layer", "stage", "cause")]
    print(json.dumps([type(told).__name__, *found, time.monotonic() - began]), flush=True)
"""


class Pool:
    """Three rank processes; rank 0 waits for 1 and rank 1 for 2, in layers 0, 1 and 2."""

    def __init__(self, hub: EventHub):
        self.hub = hub
        self.ranks = [self._start(rank) for rank in range(3)]

    def _start(self, rank: int) -> subprocess.Popen:
        return process(RANK, None, str(rank), self.hub.control_address, stdin=subprocess.PIPE)

    def say(self, rank: int, *words) -> None:
        self.ranks[rank].stdin.write(json.dumps(words) + "\n")
        self.ranks[rank].stdin.flush()

    def raised(self, rank: int) -> list:
        """What it raised: type, rank, layer, stage, cause, seconds that naming took."""
        return json.loads(self.ranks[rank].stdout.readline())

    def begin(self) -> None:
        """All alive, nothing told, each in its layer."""
        self.hub.forget()
        for rank, words in enumerate([("wait", 1), ("wait", 2), ("compute",)]):
            self.say(rank, *words)
        wait_until(lambda: [beat.layer for beat, _ in self.hub.beats().values()] == [0, 1, 2], "three ranks at work")

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture(scope="module")
def pool():
    with EventHub() as hub, ExitStack() as until_the_end:
        running = Pool(hub)
        until_the_end.callback(running.close)
        yield running


def test_all_survivors_name_the_slow_rank(pool):
    pool.begin()
    pool.say(0, "broken", 1)
    kind, rank, layer, stage, cause, seconds = pool.raised(0)
    assert (kind, rank, layer, stage, cause) == (
        "RingBroken", 2, 2, "ring hop", "alive and still computing (stage layers, n2)",
    )  # fmt: skip
    assert seconds < 1.2
    pool.say(1, "broken", 2)
    assert pool.raised(1)[:5] == [kind, rank, layer, stage, cause]
    assert pool.hub.verdict().what == "slow" and list(pool.hub.faults()) == [0, 1]


def test_a_rank_that_fails_of_its_own_is_named_at_once(pool):
    pool.begin()
    pool.say(2, "memory")
    assert pool.raised(2)[0] == "MemoryError"
    for rank, blamed in ((0, 1), (1, 2)):
        pool.say(rank, "broken", blamed)
        kind, named_rank, layer, _, cause, seconds = pool.raised(rank)
        assert (kind, named_rank, layer) == ("RingBroken", 2, 2) and cause.startswith("MemoryError: no room")
        assert seconds < 0.7


def test_a_stopped_rank_is_named(pool):
    pool.begin()
    pool.ranks[2].send_signal(signal.SIGSTOP)
    try:
        pool.say(0, "broken", 1)
        pool.say(1, "broken", 2)
        told = [pool.raised(rank) for rank in (0, 1)]
    finally:
        pool.ranks[2].send_signal(signal.SIGCONT)
    assert [each[1] for each in told] == [2, 2] and told[0][4] == told[1][4] and "no sign of life" in told[0][4]
    assert max(each[5] for each in told) < 1.2


def test_a_killed_rank_is_named_fast_and_lost(pool):
    pool.begin()
    with Subscriber(pool.hub.address) as subscriber:
        pool.ranks[2].kill()
        pool.say(1, "broken", 2)
        pool.say(0, "broken", 1)
        told = [pool.raised(rank) for rank in (0, 1)]
        assert [each[1:3] for each in told] == [[2, 2]] * 2 and "its process ended" in told[0][4]
        assert max(each[5] for each in told) < 0.8
        assert pool.hub.losses() == {2: "its process ended"}
        end = time.monotonic() + PATIENCE_S
        while not isinstance(message := subscriber.receive(1), Verdict):
            assert time.monotonic() < end
        assert str(message) == "rank 2 (layer 2, stage layers, node n2): its process ended"
    with Subscriber(pool.hub.address, beats=True) as late:
        heard = hear(late, 7)  # three beats, two faults, a loss, a verdict
        assert heard[-2:] == [RankLost(rank=2, reason="its process ended"), message]


def test_the_owner_may_see_a_rank_end_before_anyone_asks():
    with EventHub() as hub:
        assert hub.verdict() is None
        hub.lost(1, "exit code -9 \ud800")
        found = hub.verdict(patience_s=2)
        assert (found.rank, found.what, found.reason) == (1, "gone", "exit code -9 \\ud800")
        asked = ask(Fault(rank=0, what="waited", reason="RingBroken", blames=1), address=hub.control_address)
        assert asked == found


def test_the_owner_may_tell_of_a_rank_that_waits_too_long():
    with EventHub() as hub:
        who = Vitals()
        who.start(2, "c", hub.control_address)
        wait_until(lambda: 2 in hub.beats(), "a beat")
        hub.told(Fault(rank=0, what="waited", reason="too long", blames=2, waited_s=30.0))
        found = hub.verdict(patience_s=2)
        assert (found.rank, found.what, found.node) == (2, "slow", "c") and list(hub.faults()) == [0]
        who.stop()


def test_junk_is_no_question():
    with EventHub() as hub, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(hub.control_address)
        for junk in (b"", b"\xff", encode(RankLost(rank=0, reason="not for ranks to say"))):
            stranger.send(junk)
        stranger.send_multipart([b"two", b"frames"])
        wait_until(lambda: hub.malformed == 4, "four malformed messages")
        assert hub.verdict() is None and hub.losses() == {}


def test_without_a_hub_the_neighbour_is_named(monkeypatch):
    monkeypatch.delenv(CONTROL_ENV, raising=False)
    who = Vitals()
    who.layer = 5
    told = named(RingBroken(1, "ring hop", 2.0, "closed", silent=(1, 3)), who=who)
    assert (told.rank, told.layer, told.cause, told.silent) == (1, 5, "closed", (1, 3))
    assert named(told, who=who) is told
    error = ValueError("x")
    assert named(error, who=who) is error


def test_a_hub_that_is_gone_costs_its_time_and_no_more():
    with EventHub() as hub:
        address = hub.control_address
    who, began = Vitals(), time.monotonic()
    who.address = address
    assert named(RingBroken(1, "ring hop", 2.0), 0.3, who).rank == 1
    assert time.monotonic() - began < 2


DIGESTS = "ranks differ in plan (rank 0: 0x0a, rank 1: {}, rank 2: 0x0a). Start all ranks with one version."


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        (DIGESTS.format("0x0b"), 1),
        ("(rank 0: 0x0a, rank 1: 0x0b)", None),
        ("(rank 0: 0x0a, rank 1: 0x0b, rank 2: 0x0c)", None),
        ("rank 0 expected [(3, 4)] from rank 1 in shift, got []", None),
    ],
)
def test_the_odd_one_out(text, odd):
    assert odd_one_out(text) == odd


def test_a_mismatch_names_the_odd_one():
    with EventHub() as hub:
        told = []
        for rank in (0, 1):
            who = Vitals()
            who.rank, who.address = rank, hub.control_address
            told.append(str(named(RankMismatch(DIGESTS.format("0x0b")), who=who)))
    assert told[0] == told[1] and told[0].endswith("Rank 1 is the one that differs from the others.")


def test_a_torn_connection_is_not_the_ranks_own_fault():
    assert (
        fault_of(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")).what == "cut"
    )
    assert fault_of(RuntimeError("CUDA error: an illegal memory access")).what == "own"
    with EventHub() as hub:
        hub.lost(1, "exit code -9")
        hub.verdict(patience_s=2)
        who, error = Vitals(), RuntimeError("Connection reset by peer")
        who.address = hub.control_address
        assert named(error, who=who) is error
        assert error.__notes__ == ["sglang_mm: the cause is rank 1: exit code -9"]


def test_a_process_that_beats_ends():
    with EventHub() as hub:
        script = RANK.replace("for line in sys.stdin:", "time.sleep(0.1)\nfor line in []:")
        assert end_of(process(script, None, "0", hub.control_address)) == (0, "", "")
        assert list(hub.beats()) == [0]
