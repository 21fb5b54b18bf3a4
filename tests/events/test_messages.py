"""Messages survive the way there and back; nothing else is taken for one."""

import pickle

import msgspec
import numpy as np
import pytest

from sglang_mm.events import messages
from sglang_mm.events.messages import decode, encode
from tests.events.telling import stage_done, started

AT = {"prefill": "0:a", "rank": 1, "seconds": 0.25}
EVERY = [
    started(tokens={"text": 2, "video": 38}, chunk=1),
    messages.StageStarted(**AT, stage="vision"),
    messages.StageDone(**AT, stage="exchange", took=0.125),
    messages.LayerDone(**AT, layer=3, layers=4),
    messages.PrefillEnded(**AT, records={"a": {"schedule": "ring", "seconds": {"total": [1.5, 2.0]}}}, error="E: x"),
    messages.MediaProgress(request="a", medium=1, done=20, frames=7200, seconds=1.5, ended=True, error="E: x"),
    messages.RequestRecord(request="a", record={"rows_per_rank": [20, 20]}, finish="stop", answer_tokens=7),
    messages.HubAlive(forwarded=3, malformed=0),
    messages.Heartbeat(rank=1, node="b", pid=7, layer=3, layers=4, stage="layers", waits_for=[0], waits_s=1.5, at=2.5),
    messages.Fault(rank=1, what="waited", reason="RingBroken: x", blames=0, silent=[0, 2], waited_s=2.0, layer=3),
    messages.Ask(fault=messages.Fault(rank=1, what="own", reason="E: x"), within_s=1.0),
    messages.RankLost(rank=2, reason="exit code -9"),
    messages.Verdict(rank=None, what="differ", reason="ranks differ"),
    messages.RankWaits(rank=1, stages={"ring hop": messages.StageWaited(3, 1.5, 1.0, [1, 2])}, edges_s=[0.1]),
    messages.Straggler(prefill="0:a", rank=1, ranks=2, share=0.01, others=0.5, prefills=3),
]


def altered(**fields) -> bytes:
    """A good message with other fields."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(stage_done(1)), **fields})


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_there_and_back(message):
    assert decode(encode(message)) == message
    assert msgspec.json.decode(messages.to_json(message), type=messages.Event) == message


def test_every_kind_is_tried():
    assert {type(message) for message in EVERY} == set(messages.Message.__subclasses__())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"hello",
        encode(stage_done(1))[:-1],
        encode(stage_done(1)) + b"\x00",
        pickle.dumps(stage_done),
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"kind": "stage_done"}),
        b"\x91" * 100_000,
        altered(kind="unheard_of"),
        altered(rank=-1),
        altered(rank="1"),
        altered(seconds=-0.5),
        altered(schema=messages.SCHEMA + 1),
        msgspec.msgpack.encode({"kind": "heartbeat", "schema": 1, "rank": 0, "layer": -2}),
        msgspec.msgpack.encode({"kind": "fault", "schema": 1, "rank": 0, "what": "unheard of", "reason": ""}),
    ],
)
def test_anything_else_is_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode(data)


def test_a_field_from_a_later_version_is_no_reason_to_refuse():
    assert decode(altered(unheard_of=1)) == stage_done(1)


def test_numbers_of_libraries_become_numbers():
    told = messages.RequestRecord(request="a", record={"rows": np.int64(3), "seconds": [np.float32(0.5)]})
    assert decode(encode(told)).record == {"rows": 3, "seconds": [0.5]}
