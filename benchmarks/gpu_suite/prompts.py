"""Prompts without a model: texts, images and videos one after another, as a token map and as runs for the layout.

Made here from the nouns of `sglang_mm.types`, since the builder of `sglang_mm.modality` needs numpy; a test compares.
S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.types import Modality, Place, Run, TokenMap

FRAME = (12, 22)
"""264 tokens: a frame of a 360 x 640 video for Qwen2.5-VL."""


@dataclass(frozen=True)
class Part:
    """frames of rows x cols, with a newline after each row if asked; a text is one row that is no frame."""

    modality: Modality
    frames: int
    rows: int
    cols: int
    newline: bool = False

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * (self.cols + self.newline)


def text(tokens: int) -> Part:
    return Part(Modality.TEXT, 1, 1, tokens)


def image(rows: int, cols: int, newline: bool = False) -> Part:
    return Part(Modality.IMAGE, 1, rows, cols, newline)


def video(frames: int, rows: int, cols: int, newline: bool = False) -> Part:
    return Part(Modality.VIDEO, frames, rows, cols, newline)


@dataclass(frozen=True, eq=False)
class Prompt:
    """runs: what the layout cuts. tokens: on the device of the suite."""

    runs: tuple[Run, ...]
    tokens: TokenMap

    def __len__(self) -> int:
        return len(self.tokens)


def prompt(parts: Sequence[Part], device: torch.device) -> Prompt:
    """parts: in order, each of one token or more."""
    runs, columns, items = [], [], 0
    for part in parts:
        start = runs[-1].stop if runs else 0
        runs.append(Run(start, part.tokens, part.frames, part.modality.name.lower()))
        is_text = part.modality == Modality.TEXT
        columns.append(_columns(part, -1 if is_text else items))
        items += not is_text
    modality, item, frame, place, col = (torch.cat(column) for column in zip(*columns))
    span = (item.diff(prepend=item[:1]) != 0).cumsum(0, dtype=torch.int32)
    grids = tuple((part.rows, part.cols) for part in parts if part.modality != Modality.TEXT)
    return Prompt(tuple(runs), TokenMap(modality, item, frame, place, col, span, grids).to(device))


def video_prompt(
    tokens: int, device: torch.device, frame: tuple[int, int] = FRAME, before: int = 16, question: int = 64
) -> Prompt:
    """Exactly `tokens`: some text, at least `before`, as many frames as fit, a question. The shape of what is timed."""
    frames = (tokens - before - question) // (frame[0] * frame[1])
    parts = video(frames, *frame), text(question)
    return prompt([text(tokens - sum(part.tokens for part in parts)), *parts], device)


def _columns(part: Part, item: int) -> tuple[Tensor, ...]:
    """modality, item, frame, place, col of each token, as TokenMap has them."""
    size = part.tokens
    modality = torch.full((size,), int(part.modality), dtype=torch.uint8)
    if item < 0:
        none = torch.full((size,), -1, dtype=torch.int32)
        return modality, none, none, torch.full_like(none, int(Place.TEXT)), none
    places = torch.arange(part.rows * part.cols, dtype=torch.int32).view(part.rows, part.cols)
    if part.newline:
        places = torch.nn.functional.pad(places, (0, 1), value=int(Place.NEWLINE))
    place = places.flatten().repeat(part.frames)
    frame = torch.arange(part.frames, dtype=torch.int32).repeat_interleave(size // part.frames)
    return modality, torch.full_like(place, item), frame, place, torch.where(place >= 0, place % part.cols, -1)
