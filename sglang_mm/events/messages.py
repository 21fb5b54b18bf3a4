"""What is told: small structs, as msgpack between processes and as JSON for people. Never pickles.

Times are seconds; `seconds` counts from the start of the prefill on that rank, or of the reading of a medium.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

SCHEMA = 1  # raised when a field changes its meaning or is dropped; new fields have defaults and do not raise it
STAGES = ("vision", "exchange", "layers", "logits")
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


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


Event = PrefillStarted | StageStarted | StageDone | LayerDone | PrefillEnded | MediaProgress | RequestRecord | HubAlive
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
