"""What a rank is doing, as the hub hears it: set by hand, by a prefill's progress, and by the waits of a transport."""

import threading
import time
import timeit
from types import SimpleNamespace

import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.events import CONTROL_ENV, EventHub, Progress, Publisher, Subscriber, Vitals
from sglang_mm.events.messages import Heartbeat, RankWaits
from sglang_mm.events.wire import BEAT_EVERY_S
from tests.events.telling import PATIENCE_S, wait_until

ABOUT = {"ranks": 2, "new_tokens": 40, "cached_tokens": 2, "schedule": "ring"}


@pytest.fixture
def hub():
    with EventHub() as running:
        yield running


def waits(count: int, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(count=count, seconds=seconds, longest_s=seconds / count, bins=[count, 0])


def test_beats_go_on_and_tell_what_the_rank_does(hub):
    who = Vitals()
    since = time.monotonic() - 2
    who.follow(lambda: SimpleNamespace(ranks=(0, 2), stage="ring hop 1 of 2", since=since))
    who.layer, who.layers, who.stage = 3, 28, "layers"
    who.start(1, "b", hub.control_address)
    wait_until(lambda: 1 in hub.beats(), "a beat")
    beat, age = hub.beats()[1]
    assert (beat.rank, beat.node, beat.layer, beat.layers, beat.stage) == (1, "b", 3, 28, "layers")
    assert beat.waits_for == [0, 2] and beat.waits_in == "ring hop 1 of 2" and 2 <= beat.waits_s < 2 + PATIENCE_S
    wait_until(lambda: hub.beats()[1][0].at > beat.at, "another beat")
    assert hub.beats()[1][0].at - beat.at >= BEAT_EVERY_S * 0.9 and age < PATIENCE_S
    who.stop()
    time.sleep(BEAT_EVERY_S / 2)  # one may still be on its way
    last = hub.beats()[1][0]
    time.sleep(BEAT_EVERY_S * 1.2)
    assert hub.beats()[1][0] == last and hub.beats()[1][1] > BEAT_EVERY_S


def test_a_prefill_sets_layer_and_stage():
    who, seen = Vitals(), []
    with Progress(requests=["a"], rank=0, layers=3, to=Publisher(None), vitals=who, **ABOUT) as progress:
        seen.append((who.stage, who.layer, who.layers))
        with progress.stage("vision"):
            seen.append((who.stage, who.layer))
        with progress.stage("layers"):
            for layer in range(3):
                seen.append((who.stage, who.layer))
                progress.layer_done(layer)
        with progress.stage("logits"):
            seen.append((who.stage, who.layer))
    layers = [("layers", 0), ("layers", 1), ("layers", 2)]
    assert seen == [("starting", -1, 3), ("vision", -1), *layers, ("logits", -1)]
    assert (who.stage, who.layer) == ("", -1)


def test_a_prefill_that_raised_stays_where_it_was():
    who = Vitals()
    with (
        pytest.raises(RuntimeError),
        Progress(requests=["a"], rank=0, layers=3, to=Publisher(None), vitals=who, **ABOUT) as progress,
        progress.stage("layers"),
    ):
        progress.layer_done(0)
        raise RuntimeError
    assert (who.stage, who.layer) == ("layers", 1)


def test_waits_that_ended_are_added_up_and_told(hub):
    who, taken = Vitals(), [{"ring hop": waits(2, 1.0)}, {"ring hop": waits(1, 3.0), "check": waits(1, 0.5)}]
    who.follow(lambda: None, lambda: taken.pop(0), (0.1,))
    with Subscriber(hub.address, beats=True) as subscriber:
        who.rested()
        who.rested()
        who.start(1, "b", hub.control_address)
        while not isinstance(told := subscriber.receive(PATIENCE_S), RankWaits):
            assert isinstance(told, Heartbeat)
        hop, check = told.stages["ring hop"], told.stages["check"]
        assert (hop.count, hop.seconds, hop.longest_s, hop.bins) == (3, 4.0, 3.0, [3, 0])
        assert (told.rank, check.count, told.edges_s) == (1, 1, [0.1])
    with Subscriber(hub.address, beats=True) as late:
        assert isinstance(late.receive(PATIENCE_S), Heartbeat) and late.receive(PATIENCE_S) == told
    with Subscriber(hub.address) as other:
        assert other.receive(1.2 * BEAT_EVERY_S) is None, "who did not ask for beats hears none"
    who.stop()


def test_a_transport_that_is_gone_does_not_end_the_beats(hub):
    def read():
        raise AttributeError("no transport")

    who = Vitals()
    who.follow(read)
    who.start(0, address=hub.control_address)
    wait_until(lambda: 0 in hub.beats(), "a beat")
    assert hub.beats()[0][0].waits_for == []
    who.stop()


def test_without_a_hub_nothing_is_started(monkeypatch):
    monkeypatch.delenv(CONTROL_ENV, raising=False)
    before, who = threading.active_count(), Vitals()
    who.start(3, "b")
    assert threading.active_count() == before and (who.rank, who.node) == (3, "b")
    who.stop()
    with pytest.raises(ConfigError, match="SGLANG_MM_CONTROL nowhere"):
        who.start(0, address="nowhere")


def test_setting_vitals_costs_less_than_a_microsecond():
    who = Vitals()
    seconds = timeit.repeat(lambda: setattr(who, "layer", 3), number=1000, repeat=20)
    assert min(seconds) / 1000 < 1e-6
