"""A rank of a running server fails: clients are told why, the server ends by itself, and nothing is left of it."""

import json
import time

import pytest

from sglang_mm.tiny import write_checkpoint
from tests.faults.report import Row, record
from tests.faults.served import DEADLINE_S, LATE_S, Client, served
from tests.faults.served_ranks import ENV, KILLED_LOADING, LOADING, PACE_S, arm, struck_at
from tests.serving.engine_process import engine

LONG = "long enough to be sharded " * 20
WHERE, ENGINE = "HTTP server, C = 2", "Engine, C = 2"
RELEASED = "exit code 3; processes, port, shared memory, files released"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


def test_clients_hear_why_and_the_server_ends(checkpoint, tmp_path):
    with served(tmp_path) as server:
        server.start(checkpoint)
        server.wait_until_ready()
        streaming = Client(server.ask, "a stream", tokens=4000, stream=True)
        assert streaming.begun.wait(30), "the stream did not begin"
        arm(server.fault, "exception in a kernel", rank=1, layer=1)
        plain = Client(server.ask, LONG)
        for client in (plain, streaming):
            assert "rank 1 (layer 1, stage layers" in client.message()
            assert "ArithmeticError: the kernel failed, as planned" in client.message()
        assert (plain.status, streaming.status, streaming.events[-1]) == (500, 200, "[DONE]")
        assert "text" in json.loads(streaming.events[0]) and json.loads(streaming.events[-2])["error"]["code"] == 500
        exit_code = server.process.wait(LATE_S)
        ended_s = time.time() - struck_at(server.fault)
        assert exit_code == 3 and ended_s < LATE_S
        assert server.last_line().startswith("sglang_mm: rank 1 (layer 1, stage layers")
        assert not any(server.left_over().values()), server.left_over()
        seconds = {"first_s": plain.ended_at - struck_at(server.fault), "all_s": ended_s}
        told = {"by": "the rank itself", "seen": f"500: {plain.message()}", "afterwards": RELEASED}
        record(Row(WHERE, "exception in a kernel", "last layer", "auto", **seconds, **told))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"), [(LOADING, "a shard of the weights is cut off"), (KILLED_LOADING, "SIGKILL")]
)
def test_a_rank_that_fails_while_it_loads(fault, words, checkpoint, tmp_path):
    with served(tmp_path) as server:
        arm(server.fault, fault, rank=1)
        server.start(checkpoint)
        began = time.monotonic()
        assert server.process.wait(90) == 3
        assert server.last_line().startswith("sglang_mm: rank 1") and words in server.last_line()
        assert not any(server.left_over().values()), server.left_over()
        record(Row(WHERE, fault, all_s=time.monotonic() - began, seen=server.last_line(), afterwards=RELEASED))


@pytest.mark.slow
def test_a_client_that_leaves_and_a_server_that_is_killed(checkpoint, tmp_path):
    """A prefill whose client is gone gives everything back; ranks do not outlive their server."""
    with served(tmp_path) as server:
        server.start(checkpoint)
        server.wait_until_ready()
        assert not server.all_is_free()
        arm(server.fault, "3x slow", rank=1)  # a prefill of half a second and more
        for stream in (False, True):
            server.leave_in_mid_prefill(LONG * 4, stream)
        assert not server.all_is_free()
        assert server.ask(LONG).status_code == 200 and server.process.poll() is None
        server.process.kill()
        began = time.monotonic()
        assert not server.left_over(10)["processes"]
        left = "ranks end by themselves; files go when the next server starts"
        told = {"seen": "a closed connection", "afterwards": left, "all_s": time.monotonic() - began}
        record(Row(WHERE, "SIGKILL of the server's own process", **told))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "layer", "words"),
    [
        ("exit", 0, "its process ended"),
        ("SIGKILL", 1, "its process ended"),
        ("SIGSTOP", 1, "no sign of life"),
        ("wrong digest", 0, "RankMismatch"),
        ("out of memory", 0, "can't allocate memory"),
        ("exception in a kernel", 1, "ArithmeticError: the kernel failed, as planned"),
    ],
)
def test_a_program_with_an_engine_goes_on(fault, layer, words, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv(ENV, str(tmp_path / "fault"))
    arguments = {"model_path": checkpoint, "cp": 2, "deadline_s": DEADLINE_S, "cp_min_tokens": 64}
    with engine("tests.faults.served_engine:FaultyEngine", **arguments) as ask:
        if fault == "exit":
            slowed = ask("tests.faults.served_engine:slowed")
            (ids, quick_s), (same, slow_s) = slowed["as ever"], slowed["slow"]
            assert ids == same and slow_s > quick_s + 2 * 3 * PACE_S * 0.9
            seen = "the same answer, later by so much"
            record(Row(ENGINE, "3x slow", "all layers", "auto", all_s=slow_s - quick_s, seen=seen))
        told = ask("tests.faults.served_engine:struck", fault, layer)
    for message in (*told["under way"], *told["later"]):
        assert words in message and (fault == "wrong digest" or message.startswith("rank 1")), message
    assert told["first_s"] < LATE_S and told["all_s"] < LATE_S and told["later_s"] < 1
    assert not told["alive"] and not told["children"] and not told["pixels"], told
    moment, afterwards = ("first", "last")[layer] + " layer", "the program goes on; ranks and pixels are gone"
    seconds = {"first_s": told["first_s"], "all_s": told["all_s"]}
    record(Row(ENGINE, fault, moment, "auto", **seconds, seen=told["under way"][0], afterwards=afterwards))
