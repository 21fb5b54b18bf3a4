"""The progress of a prefill, from its start to its end, however it ends."""

import threading

import pytest

from sglang_mm.events import EventHub, Progress, Publisher, Subscriber
from sglang_mm.events.messages import LayerDone, PrefillEnded, PrefillStarted, StageDone, StageStarted
from tests.events.telling import hear

ABOUT = {"ranks": 2, "new_tokens": 40, "cached_tokens": 2, "schedule": "ring", "tokens": {"text": 2, "video": 38}}


@pytest.fixture
def told():
    """(a publisher, a subscriber to the same hub)"""
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        telling = Publisher(hub.ranks_address)
        yield telling, subscriber
        telling.close()


def test_a_prefill_is_told_in_order(told):
    telling, subscriber = told
    with Progress(requests=["a", "b"], rank=1, layers=3, to=telling, **ABOUT) as progress:
        with progress.stage("vision"):
            pass
        with progress.stage("layers"):
            for layer in range(3):
                progress.layer_done(layer)
        progress.records = {"a": {"schedule": "ring"}}
    heard = hear(subscriber, 8)
    kinds = [PrefillStarted, StageStarted, StageDone, StageStarted, LayerDone, LayerDone, StageDone, PrefillEnded]
    assert [type(message) for message in heard] == kinds
    assert (heard[0].requests, heard[0].layers, heard[0].tokens) == (["a", "b"], 3, ABOUT["tokens"])
    assert [message.layer for message in heard[4:6]] == [0, 2]
    assert (heard[-1].records, heard[-1].error) == ({"a": {"schedule": "ring"}}, "")
    assert len({(message.prefill, message.rank) for message in heard}) == 1
    seconds = [message.seconds for message in heard[1:]]
    assert seconds == sorted(seconds)


def test_a_prefill_that_fails_is_told_too(told):
    telling, subscriber = told
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        Progress(requests=["a"], rank=0, layers=3, to=telling, **ABOUT) as progress,
        progress.stage("vision"),
    ):
        raise RuntimeError("out of memory")
    assert [type(message) for message in hear(subscriber, 2)] == [PrefillStarted, StageStarted]
    assert hear(subscriber, 1)[0].error == "RuntimeError: out of memory"


def test_prefills_have_ids_of_their_own():
    silent = Publisher(None)
    first, second = (Progress(requests=["a"], rank=0, layers=1, to=silent, **ABOUT) for _ in range(2))
    assert first.prefill != second.prefill


def test_a_layer_is_told_when_the_device_has_reached_it(told):
    telling, subscriber = told
    reached = [threading.Event() for _ in range(4)]
    with Progress(requests=["a"], rank=0, layers=4, to=telling, **ABOUT) as progress:
        assert isinstance(hear(subscriber, 1)[0], PrefillStarted)
        for layer, event in enumerate(reached):
            progress.layer_done(layer, event.is_set)
        assert subscriber.receive(0.2) is None
        reached[0].set()
        reached[1].set()
        assert hear(subscriber, 1)[0].layer in (0, 1)
        reached[3].set()  # layer 2 comes first
        while (message := subscriber.receive(0.2)) is not None:
            assert message.layer < 2
        reached[2].set()
    *_, last, ended = hear(subscriber, 2)
    assert (last.layer, type(ended)) == (3, PrefillEnded)


def test_without_a_hub_nothing_is_asked():
    def reached() -> bool:
        raise AssertionError("asked")

    before = threading.active_count()
    with Progress(requests=["a"], rank=0, layers=4, to=Publisher(None), **ABOUT) as progress:
        with progress.stage("layers"):
            progress.layer_done(0, reached)
        assert threading.active_count() == before
