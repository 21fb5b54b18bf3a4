"""Prompts from a short description, for pictures and counts: `text:20,video:8x4x6,text:40,image:6x4`.

    text:TOKENS
    image:ROWSxCOLUMNS[+newline]               one frame
    video:FRAMESxROWSxCOLUMNS[+newline][+timestamps]

newline: a newline token after each row. timestamps: as Qwen3-VL writes videos, before each frame TIMESTAMP tokens of
text and a vision start, after it a vision end.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.modality import Item, Wraps, build_token_map, frame_places
from sglang_mm.types import Modality, TokenMap

TIMESTAMP = 5
"""Tokens of `<12.5 seconds>`."""
LARGEST = 2**24
"""Tokens. Four times the longest prompts that this package was made for."""
GRAMMAR = "text:20, image:6x4, video:8x4x6, with +newline after media and +timestamps after videos"

_PART = re.compile(r"(text|image|video):(\d{1,9}(?:x\d{1,9})*)((?:\+[a-z]+)*)")
_SIZES = {"text": 1, "image": 2, "video": 3}
_OPTIONS = {"text": set(), "image": {"newline"}, "video": {"newline", "timestamps"}}
_TEXT_ID, _START_ID, _END_ID, _MEDIA_ID = range(4)


def parse_geometry(description: str) -> TokenMap:
    """The TokenMap of the described prompt, on the CPU.

    Raises ConfigError for a part that is not in the grammar, and for a prompt of more than LARGEST tokens.
    """
    prompt = _Prompt()
    for part in description.split(","):
        kind, sizes, options = _parse(part.strip())
        if kind == "text":
            prompt.add(1, (_TEXT_ID, sizes[0]))
        else:
            prompt.add_media(Modality[kind.upper()], *([1, *sizes] if kind == "image" else sizes), options)
    return build_token_map(torch.cat(prompt.ids), prompt.items, Wraps(_START_ID, _END_ID))


def _parse(part: str) -> tuple[str, list[int], set[str]]:
    found = _PART.fullmatch(part)
    if not found:
        raise ConfigError(f"{part!r} in a prompt", GRAMMAR, "separate parts by commas")
    kind, sizes = found[1], [int(size) for size in found[2].split("x")]
    options = found[3].split("+")[1:]
    if len(sizes) != _SIZES[kind] or min(sizes) < 1:
        raise ConfigError(f"{part!r} in a prompt", f"{_SIZES[kind]} sizes of 1 or more for {kind}", f"see {GRAMMAR}")
    if not _OPTIONS[kind] >= set(options):
        allowed = ", ".join(f"+{name}" for name in sorted(_OPTIONS[kind])) or "no option"
        raise ConfigError(f"{part!r} in a prompt", f"{allowed} for {kind}", f"see {GRAMMAR}")
    return kind, sizes, set(options)


@dataclass
class _Prompt:
    """Ids and items of a prompt that is written from left to right."""

    ids: list[Tensor] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    length: int = 0

    def add(self, repeats: int, *runs: tuple[int, int]) -> None:
        """Runs of (id, tokens) that follow one another, all of them so many times."""
        self.length += repeats * sum(tokens for _, tokens in runs)
        if self.length > LARGEST:
            raise ConfigError(f"a prompt of {self.length} tokens or more", f"up to {LARGEST}", "describe a shorter one")
        ids, tokens = torch.tensor(runs).T
        self.ids.append(ids.repeat_interleave(tokens).repeat(repeats))

    def add_media(self, modality: Modality, frames: int, rows: int, cols: int, options: set[str]) -> None:
        newline = "newline" in options
        frame = (_MEDIA_ID, rows * (cols + newline))
        before, after = [], []
        if "timestamps" in options:
            before, after = [(_TEXT_ID, TIMESTAMP), (_START_ID, 1)], [(_END_ID, 1)]
        first = self.length
        self.add(frames, *before, frame, *after)
        starts = torch.arange(first, self.length, (self.length - first) // frames) + sum(tokens for _, tokens in before)
        self.items.append(Item(modality, (rows, cols), starts, frame_places(rows, cols, newline=newline)))
