"""Token maps put together by hand, part by part, and not by the code that reads real prompts."""

from dataclasses import dataclass

import torch

from sglang_mm.types import Modality, Place, TokenMap


@dataclass(frozen=True)
class Text:
    tokens: int


@dataclass(frozen=True)
class Media:
    """frames > 1: a video. before: timestamp tokens of each frame. newline: one after each row."""

    frames: int
    rows: int
    cols: int
    before: int = 0
    newline: bool = False


def token_map(*parts: Text | Media) -> TokenMap:
    """The map of a prompt that consists of these parts."""
    columns, grids = [], []
    for span, part in enumerate(parts):
        if isinstance(part, Text):
            columns.append(torch.tensor([Modality.TEXT, -1, -1, Place.TEXT, -1, span]).expand(part.tokens, -1))
        else:
            columns.append(_media(part, len(grids), span))
            grids.append((part.rows, part.cols))
    modality, item, frame, place, col, span = torch.cat(columns).T.contiguous().int()
    return TokenMap(modality.to(torch.uint8), item, frame, place, col, span, tuple(grids))


def _media(part: Media, item: int, span: int) -> torch.Tensor:
    """int64 [tokens, 6]."""
    one = [(Place.TIMESTAMP, -1)] * part.before
    for row in range(part.rows):
        one += [(row * part.cols + col, col) for col in range(part.cols)]
        one += [(Place.NEWLINE, -1)] * part.newline
    place, col = torch.tensor(one).repeat(part.frames, 1).T
    frame = torch.arange(part.frames).repeat_interleave(len(one))
    modality = torch.full_like(place, Modality.VIDEO if part.frames > 1 else Modality.IMAGE)
    shared = [torch.full_like(place, value) for value in (item, span)]
    return torch.stack([modality, shared[0], frame, place, col, shared[1]], 1)
