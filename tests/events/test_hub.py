"""The hub between real processes: order, late subscribers, junk, closing."""

import pickle
import time

import pytest
import zmq

from sglang_mm.errors import ConfigError, SglangMMError
from sglang_mm.events import CONTROL_ENV, ENV, EventHub, Publisher, Subscriber, subscribe, subscribing
from sglang_mm.events.messages import LayerDone, PrefillEnded, RequestRecord, encode
from sglang_mm.events.wire import LARGEST
from tests.events.telling import end_of, hear, process, stage_done, started, wait_until

TELL_MANY = """
import sys
from sglang_mm.events.messages import StageDone
from sglang_mm.events import publisher
rank, count = map(int, sys.argv[1:])
for i in range(count):
    assert publisher().emit(StageDone(prefill="p", rank=rank, stage="s", seconds=0.0, took=float(i)))
publisher().close()
"""
LEAVE_OPEN = """
from sglang_mm.events import CONTROL_ENV, ENV, EventHub, Publisher, Subscriber
hub = EventHub()
publisher, subscriber = Publisher(hub.ranks_address), Subscriber(hub.address)
publisher.emit(__import__("sglang_mm.events.messages").events.messages.HubAlive(forwarded=0, malformed=0))
print("end")
"""


@pytest.fixture
def hub():
    with EventHub() as running:
        yield running


@pytest.fixture
def publisher(hub):
    telling = Publisher(hub.ranks_address)
    yield telling
    telling.close()


@pytest.fixture
def subscriber(hub):
    with Subscriber(hub.address) as listening:
        yield listening


def test_several_processes_reach_several_subscribers(hub, subscriber):
    ranks, count = 3, 200
    with Subscriber(hub.address) as other:
        running = [process(TELL_MANY, hub.ranks_address, str(rank), str(count)) for rank in range(ranks)]
        heard = hear(subscriber, ranks * count)
        assert hear(other, ranks * count) == heard
    for rank in range(ranks):
        assert [message.took for message in heard if message.rank == rank] == list(range(count))
    assert [end_of(each)[::2] for each in running] == [(0, "")] * ranks
    assert (hub.forwarded, hub.malformed) == (ranks * count, 0)


def test_junk_is_dropped_and_counted(hub, publisher, subscriber):
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(hub.ranks_address)
        for junk in (b"", b"\xff" * 100, pickle.dumps({"kind": "stage_done"}), encode(stage_done(1))[:-1]):
            stranger.send(junk)
        stranger.send_multipart([b"two", b"frames"])
        stranger.send(b"x" * (LARGEST + 1))  # cuts this stranger off, uncounted
        wait_until(lambda: hub.malformed == 5, "five malformed messages")
        publisher.emit(stage_done(7))
        assert hear(subscriber, 1) == [stage_done(7)]
    assert (hub.forwarded, hub.malformed) == (1, 5)


def test_who_comes_late_hears_what_is_under_way(hub, publisher):
    layer = LayerDone(prefill="0:a", rank=0, layer=3, layers=4, seconds=2.0)
    begun = [started(rank=0), started(rank=1)]
    ended = [started("9:gone", rank=2), PrefillEnded(prefill="9:gone", rank=2, seconds=1.0)]
    told = [*ended, *begun, stage_done(1), layer, RequestRecord(request="b", record={})]
    assert all(map(publisher.emit, told))
    wait_until(lambda: hub.forwarded == len(told), "all messages")
    with Subscriber(hub.address) as late:
        assert hear(late, 3) == [begun[0], layer, begun[1]]
        publisher.emit(stage_done(2))
        assert hear(late, 1) == [stage_done(2)]
        with Subscriber(hub.address) as later:
            assert hear(later, 3) == [begun[0], stage_done(2), begun[1]]
        assert late.receive(0.1) is None  # what others missed is not told again


def test_closing_frees_the_ports_and_ends_the_thread():
    first = EventHub()
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} for events .*in use"):
        EventHub(port=port)
    first.close()
    first.close()
    with EventHub(port=port) as second, Subscriber(second.address):
        assert second.address == first.address


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_is_a_port(port):
    with pytest.raises(ConfigError, match="65535"):
        EventHub(ranks_port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "", "localhost", "224.0.0.1", "192.0.2.1"])
def test_a_host_is_one_address_of_this_machine(host):
    with pytest.raises(ConfigError, match="not all of them"):
        EventHub(host=host)


def test_ranks_connect_on_the_given_host_and_subscribers_on_loopback():
    with EventHub(host="127.0.0.2") as hub, Subscriber(hub.address) as subscriber:
        assert hub.ranks_address.startswith("tcp://127.0.0.2:") and hub.control_address.startswith("tcp://127.0.0.2:")
        assert hub.address.startswith("tcp://127.0.0.1:")
        assert hub.environment == {ENV: hub.ranks_address, CONTROL_ENV: hub.control_address}
        telling = Publisher(hub.ranks_address)
        telling.emit(started())
        assert len(hear(subscriber, 1)) == 1
        telling.close()


def test_a_process_that_closes_nothing_ends():
    assert end_of(process(LEAVE_OPEN, None)) == (0, "end\n", "")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere", "tcp://127.0.0.1:port"])
def test_nobody_there_is_an_error_in_time(address):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=address):
        Subscriber(address, deadline_s=0.2)
    assert time.monotonic() - start < 5


def test_a_hub_that_ends_is_noticed(monkeypatch):
    monkeypatch.setattr(subscribing, "LOST_AFTER_S", 0.3)
    hub = EventHub()
    with Subscriber(hub.address) as subscriber:
        hub.close()
        with pytest.raises(SglangMMError, match="no sign of life"):
            subscriber.receive(10)


def test_subscribe_ends_after_silence(hub, publisher):
    events = subscribe(hub.address, timeout_s=0.2)
    publisher.emit(started())
    assert [type(event).__name__ for event in events] == ["PrefillStarted"]
