"""Ranks of a running server that Ray loses: a killed actor, and a node whose power is cut."""

import contextlib
import os
import signal
import time

import psutil
import pytest
import requests

from tests.faults.report import Row, record
from tests.faults.served import DEADLINE_S, LATE_S, Client, Served, served

pytestmark = pytest.mark.slow
LONG = "long enough to be sharded " * 20
WHERE = "Ray, 2 nodes, C = 2"
NOTHING = "exit code 3; nothing left over"


@pytest.fixture
def starting(cluster, checkpoint, tmp_path, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    with served(tmp_path) as one:
        one.start(checkpoint, "--nodes", "2", "--ray-address", cluster.address)
        yield one


@pytest.fixture
def server(starting):
    starting.wait_until_ready()
    return starting


def ranks_of(server: Served) -> list[dict]:
    return requests.get(f"{server.url}/sglang_mm/status", timeout=10).json()["ranks"]


def assert_all_on_loopback(roots: list[psutil.Process]) -> None:
    """Whatever these processes and their children listen on; Ray's daemons and ranks are among them."""
    processes = [process for root in roots for process in root.children(recursive=True)] + roots
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and all(ip.startswith("127.") for ip in listening), listening


def killed_actor(cluster, ranks: list[dict]) -> None:
    os.kill(ranks[1]["pid"], signal.SIGKILL)


def lost_node(cluster, ranks: list[dict]) -> None:
    cluster.nodes.lose_node(ranks[1]["node"])


@pytest.mark.parametrize("fault", [killed_actor, lost_node])
def test_a_rank_that_ray_loses(server, cluster, fault):
    ranks = ranks_of(server)
    first, second = (rank["node"] for rank in ranks)
    assert first != second and first.startswith("local-") and second.startswith("local-")
    assert_all_on_loopback([psutil.Process(), psutil.Process(server.process.pid)])
    streaming = Client(server.ask, "a stream", tokens=4000, stream=True)
    assert streaming.begun.wait(30), "the stream did not begin"
    struck = time.time()
    fault(cluster, ranks)
    plain = Client(server.ask, LONG)
    told = streaming.message()
    assert "rank 1" in told and second in told
    assert plain.message() and plain.status >= 500
    exit_code = server.process.wait(LATE_S)
    ended_s = time.time() - struck
    assert exit_code == 3 and ended_s < DEADLINE_S + 5
    assert not any(server.left_over().values()), server.left_over()
    seconds = {"first_s": streaming.ended_at - struck, "all_s": ended_s}
    name = fault.__name__.replace("_", " ")
    seen = {"by": "Ray, and the ring", "seen": f"stream: {told}", "afterwards": NOTHING}
    record(Row(WHERE, name, "decode", "auto", **seconds, **seen))
    if fault is lost_node:
        cluster.nodes.add_node()


def actors() -> list[psutil.Process]:
    """Processes of ranks, on all nodes."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "SchedulerActor" in "".join(process.cmdline()):
                found.append(process)
    return found


def wait_for_actors(count: int, within_s: float) -> list[psutil.Process]:
    until = time.monotonic() + within_s
    while len(found := actors()) != count and time.monotonic() < until:
        time.sleep(0.1)
    assert len(found) == count, found
    return found


def test_an_actor_that_ends_while_it_loads(starting):
    found = wait_for_actors(2, 90)
    struck = time.time()
    found[0].kill()
    assert starting.process.wait(60) == 3, starting.log.read_text()[-3000:]
    assert "while it loaded" in starting.last_line() and "node local-" in starting.last_line()
    assert not any(starting.left_over().values()), starting.left_over()
    wait_for_actors(0, 10)
    seconds = {"all_s": time.time() - struck}
    record(Row(WHERE, "killed actor", "loading", **seconds, by="Ray", seen=starting.last_line(), afterwards=NOTHING))


def test_ranks_end_with_the_servers_own_process(server):
    wait_for_actors(2, 1)
    struck = time.time()
    server.process.kill()
    wait_for_actors(0, 30)
    seconds = {"all_s": time.time() - struck}
    record(Row(WHERE, "SIGKILL of the server's own process", by="Ray", **seconds, seen="a closed connection"))
