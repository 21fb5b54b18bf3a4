"""What writer, readers and the answering thread agree on: names, limits, messages, and which machine this is."""

import os
import re
import socket
import uuid
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sglang_mm.errors import SglangMMError

DIRECTORY = "SGLANG_MM_PIXELS"  # in the environment of ranks: the store's directory
MACHINE = "SGLANG_MM_MACHINE"  # in the environment: another name for this machine than machine() finds
LOOPBACK = "127.0.0.1"
NAME = re.compile(r"[0-9a-f]{32}")
ANSWER_DEADLINE_S = 60.0
ANSWER_BYTES = 16 << 20  # of one answer; who reads more asks again
LARGEST_QUESTION = 4096  # bytes; who sends more is cut off
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class NoRoom(SglangMMError, OSError):
    """The disk, or memory, below the store cannot hold the patches. given, allowed, remedy: as in ConfigError."""

    def __init__(self, given: str, allowed: str, remedy: str):
        super().__init__(f"{given}. Allowed: {allowed}. Remedy: {remedy}.")
        self.given, self.allowed, self.remedy = given, allowed, remedy


class PixelsGone(SglangMMError, RuntimeError):
    """Stored patches that cannot be read: their request has ended, or their store does not answer."""


class Home(msgspec.Struct, frozen=True):
    """machine: where the store runs. address: where it answers those that run elsewhere, tcp://HOST:PORT."""

    machine: str
    address: str


class Read(msgspec.Struct, frozen=True):
    """Rows [first, first + rows) of a file, each of `width` bytes."""

    name: str
    first: Annotated[int, Meta(ge=0)]
    rows: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]


class Answer(msgspec.Struct, frozen=True):
    """refused: empty, and the bytes follow as a frame of their own; or why there are none."""

    refused: str = ""


def is_name(name: object) -> bool:
    """Whether it is one that a store makes; a name is never a path."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


@cache
def _found_machine() -> str:
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else f"{uuid.getnode():x}"
    return f"{socket.gethostname()} {boot}"


def machine() -> str:
    """The same for all processes that run on one machine until it is started again; another one elsewhere."""
    return os.environ.get(MACHINE) or _found_machine()
