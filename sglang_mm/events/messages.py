"""What is told: small structs, as msgpack between processes and as JSON for people. Never pickles.

Times are seconds; `seconds` counts from the start of the prefill on that rank, or of the reading of a medium.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

SCHEMA = 1  # raised when a field changes its meaning or is dropped; new fields have defaults and do not raise it
STAGES = ("vision", "exchange", "layers", "logits")
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Layer = Annotated[int, Meta(ge=-1)]  # from 0; -1 outside of layers


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """schema: of the sender; a receiver of another schema drops the message."""

    schema: int = SCHEMA


class PrefillStarted(Message, tag="prefill_started"):
    """One rank starts a prefill batch. new_tokens, cached_tokens, tokens (new ones by modality): of the whole batch.

    prefill: equal on all ranks, differs between batches. requests: ids, as in responses. layers: of the model.
    chunk: how many chunks of these requests went before. at: Unix time.
    """

    prefill: str
    requests: list[str]
    rank: Count
    ranks: Annotated[int, Meta(ge=1)]
    new_tokens: Count
    cached_tokens: Count
    layers: Count
    schedule: str
    tokens: dict[str, Count] = {}
    chunk: Count = 0
    at: float = 0.0


class StageStarted(Message, tag="stage_started"):
    """stage: one of STAGES."""

    prefill: str
    rank: Count
    stage: str
    seconds: Seconds


class StageDone(Message, tag="stage_done"):
    """took: seconds from the stage's start on this rank."""

    prefill: str
    rank: Count
    stage: str
    seconds: Seconds
    took: Seconds


class LayerDone(Message, tag="layer_done"):
    """layer: from 0; layers: how many there are. Most are left out when they follow each other fast."""

    prefill: str
    rank: Count
    layer: Count
    layers: Count
    seconds: Seconds
    stage: str = "layers"


class PrefillEnded(Message, tag="prefill_ended"):
    """records: request id -> what ran, as in meta info. error: empty, or what ended the prefill early."""

    prefill: str
    rank: Count
    seconds: Seconds
    records: dict[str, dict[str, Any]] = {}
    error: str = ""


class MediaProgress(Message, tag="media_progress"):
    """One video of a request is being read. medium: its number, from 0. done: of so many `frames`.

    ended: it is over; error: empty, or what ended it early.
    """

    request: str
    medium: Count
    done: Count
    frames: Count
    seconds: Seconds
    ended: bool = False
    error: str = ""


class RequestRecord(Message, tag="request_record"):
    """A request ended. record: as in meta info; finish: SGLang's type of its end (stop, length, abort)."""

    request: str
    record: dict[str, Any]
    finish: str = ""
    answer_tokens: Count = 0


class HubAlive(Message, tag="hub_alive"):
    """The hub's sign of life. forwarded, malformed: messages since its start; malformed ones were dropped."""

    forwarded: Count
    malformed: Count


class Heartbeat(Message, tag="heartbeat"):
    """A process of a rank is alive. rank: in the world; node: its machine, empty where there is only one.

    stage: of the prefill under way, empty without one. waits_for: ranks that it waits for now, for waits_s so far, in
    the exchange waits_in. at: Unix time.
    """

    rank: Count
    node: str = ""
    pid: Count = 0
    layer: Layer = -1
    layers: Count = 0
    stage: str = ""
    waits_for: list[Count] = []
    waits_s: Seconds = 0.0
    waits_in: str = ""
    at: float = 0.0


class Fault(Message, tag="fault"):
    """A rank fails. rank, node, layer, stage: where it was. reason: the error, in one line.

    what: `own`, an error of its own; `waited` for `blames` and the others that were `silent`, for waited_s; `differ`
    from other ranks, of which `blames` is the odd one out, or None; `cut` off from some rank that it cannot name.
    """

    rank: Count
    what: Literal["own", "waited", "differ", "cut"]
    reason: str
    node: str = ""
    layer: Layer = -1
    stage: str = ""
    blames: Count | None = None
    silent: list[Count] = []
    waited_s: Seconds = 0.0


class Ask(Message, tag="ask"):
    """A rank tells its fault to the hub and asks who is the cause. within_s: how long it waits for the answer."""

    fault: Fault
    within_s: Seconds


class RankLost(Message, tag="rank_lost"):
    """The process of a rank has ended, or its connection to the hub has."""

    rank: Count
    reason: str


class Verdict(Message, tag="verdict"):
    """Who is the cause of a fault: one answer for all that ask. rank: None if no rank stands out.

    what: `failed` of its own; `gone`, its process ended; `silent`, stopped or cut off; `slow`, it still computes;
    `circle`, ranks wait for each other; `differ`, ranks do; `unknown`. node, layer, stage: where it was last.
    """

    rank: Count | None
    what: Literal["failed", "gone", "silent", "slow", "circle", "differ", "unknown"]
    reason: str
    node: str = ""
    layer: Layer = -1
    stage: str = ""

    @property
    def place(self) -> str:
        """`layer 3, stage layers, node b`; empty where nothing is known."""
        layer = f"layer {self.layer}" if self.layer >= 0 else ""
        stage, node = self.stage and f"stage {self.stage}", self.node and f"node {self.node}"
        return ", ".join(filter(None, (layer, stage, node)))

    def __str__(self) -> str:
        who = "no single rank" if self.rank is None else f"rank {self.rank}"
        return f"{who}{f' ({self.place})' if self.place else ''}: {self.reason}"


class StageWaited(msgspec.Struct, frozen=True):
    """Waits of one stage that ended. seconds: their sum; bins: how many per bin of edges_s, and one more for longer."""

    count: Count
    seconds: Seconds
    longest_s: Seconds
    bins: list[Count]


class RankWaits(Message, tag="rank_waits"):
    """How a rank has waited for others since it started, by exchange. edges_s: upper edges of the bins."""

    rank: Count
    stages: dict[str, StageWaited]
    edges_s: list[Seconds] = []
    node: str = ""


class Straggler(Message, tag="straggler"):
    """The others wait for one rank, `prefills` in a row. rank, ranks: as in records, places in the ring.

    share: of its prefill that the slow rank waited; others: the median of such shares; 0 to 1. prefill: the last one.
    """

    prefill: str
    rank: Count
    ranks: Annotated[int, Meta(ge=2)]
    share: Seconds
    others: Seconds
    prefills: Annotated[int, Meta(ge=1)]


Event = (
    PrefillStarted
    | StageStarted
    | StageDone
    | LayerDone
    | PrefillEnded
    | MediaProgress
    | RequestRecord
    | HubAlive
    | Heartbeat
    | Fault
    | Ask
    | RankLost
    | Verdict
    | RankWaits
    | Straggler
)
_encoder = msgspec.msgpack.Encoder(enc_hook=lambda value: value.item() if hasattr(value, "item") else repr(value))
_decoder = msgspec.msgpack.Decoder(Event)


def encode(message: Event) -> bytes:
    """As msgpack."""
    return _encoder.encode(message)


def to_json(message: Event) -> str:
    """One line."""
    return msgspec.json.encode(message).decode()


def decode(data: bytes) -> Event:
    """From msgpack. Raises msgspec.DecodeError for whatever is not one whole message of this schema."""
    try:
        message = _decoder.decode(data)
    except (UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise msgspec.DecodeError(str(error)) from error
    if message.schema != SCHEMA:
        raise msgspec.ValidationError(f"schema {message.schema}, this is schema {SCHEMA}")
    return message
