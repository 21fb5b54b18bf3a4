"""Telling never waits, never raises and costs little; layers that follow each other fast are left out."""

import statistics
import time

import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.events import EventHub, Publisher, Subscriber, publisher
from sglang_mm.events.messages import LayerDone
from sglang_mm.events.wire import LAYERS_EVERY_S
from tests.events.telling import end_of, hear, process, stage_done, started

NO_HUB = "tcp://127.0.0.1:1"
LAYERS = 200
FORKS = """
import os, sys
from sglang_mm.events import publisher
from sglang_mm.events.messages import StageDone
def tell(rank):
    assert publisher().emit(StageDone(prefill="p", rank=rank, stage="s", seconds=0.0, took=0.0))
    publisher().close()
inherited = publisher()
inherited.emit(StageDone(prefill="p", rank=0, stage="s", seconds=0.0, took=0.0))
child = os.fork()
if child == 0:
    assert not inherited.on and publisher() is not inherited
    tell(1)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
tell(2)
"""


def layer_done(layer: int) -> LayerDone:
    return LayerDone(prefill="0:a", rank=0, layer=layer, layers=LAYERS, seconds=1.0)


def test_what_does_not_fit_is_dropped_without_waiting():
    telling = Publisher(NO_HUB, queued=5)
    start = time.monotonic()
    told = [telling.emit(stage_done(i)) for i in range(1000)]
    assert time.monotonic() - start < 5
    assert told == [True] * 5 + [False] * 995 and telling.dropped == 995
    telling.close(linger_s=0)


def test_telling_goes_on_after_the_hub_has_ended():
    hub = EventHub()
    telling = Publisher(hub.ranks_address, queued=10)
    telling.emit(started())
    hub.close()
    told = [telling.emit(stage_done(i)) for i in range(200)]
    assert told[-1] is False and telling.dropped > 0
    telling.close(linger_s=0.1)
    assert telling.emit(started()) is False


def test_what_cannot_be_told_is_dropped():
    telling = Publisher(NO_HUB)
    assert telling.emit(started(requests=["half a pair: \ud800"])) is False
    assert telling.dropped == 1
    telling.close(linger_s=0)


def test_without_a_hub_nobody_is_told(monkeypatch):
    monkeypatch.delenv("SGLANG_MM_EVENTS", raising=False)
    monkeypatch.setattr("sglang_mm.events.publishing._mine", None)
    assert not publisher().on and publisher().emit(started()) is False
    assert publisher() is publisher() and publisher().dropped == 0


def test_an_address_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match="SGLANG_MM_EVENTS nowhere"):
        Publisher("nowhere")


def test_forked_processes_have_publishers_of_their_own():
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        running = process(FORKS, hub.ranks_address)
        assert sorted(message.rank for message in hear(subscriber, 3)) == [0, 1, 2]
        assert end_of(running)[::2] == (0, "")


def test_of_fast_layers_few_are_told_and_the_last_always():
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        telling = Publisher(hub.ranks_address)
        start = time.monotonic()
        told = [layer for layer in range(LAYERS) if telling.emit(layer_done(layer))]
        allowed = 2 + (time.monotonic() - start) / LAYERS_EVERY_S
        assert told[0] == 0 and told[-1] == LAYERS - 1 and 2 <= len(told) <= allowed
        assert [message.layer for message in hear(subscriber, len(told))] == told
        assert telling.dropped == 0
        time.sleep(LAYERS_EVERY_S)
        assert telling.emit(layer_done(7))
        assert telling.emit(stage_done(1)) and telling.emit(stage_done(2))  # other messages are never left out
        telling.close()


def test_telling_costs_less_than_fifty_microseconds():
    with EventHub() as hub:
        telling, message, seconds = Publisher(hub.ranks_address), stage_done(1), []
        for _ in range(2000):
            start = time.perf_counter()
            telling.emit(message)
            seconds.append(time.perf_counter() - start)
        assert statistics.median(seconds) < 50e-6
        telling.close()
