"""A prompt written down token by token, and what each token must be: the oracle, in loops, of rules R1 to R5.

R1: between two frames of one item, fewer than 64 tokens belong to the item. R2: newlines and ends are no places.
R3: more tokens are text, and a span of their own. R4: classes are coordinates. R5 is tested in tests/types.
"""

from dataclasses import dataclass, field

import torch

from sglang_mm.modality import Medium, Wraps
from sglang_mm.types import Modality, Place, TokenMap

TEXT, START, END, LINE_END = 7, 101, 102, 103
PLACEHOLDERS = {Modality.IMAGE: 201, Modality.VIDEO: 202}
HASH = 1_000_000
WRAPS = Wraps(START, END)
COLUMNS = ("modality", "item", "frame", "place", "col", "span")


@dataclass
class Token:
    """id: what stands in the prompt if it is no placeholder. item, frame, place, col: of media, else None."""

    id: int | None
    item: int | None = None
    frame: int | None = None
    place: int = Place.TEXT
    col: int = -1


@dataclass
class Script:
    tokens: list[Token] = field(default_factory=list)
    media: list[tuple[Modality, tuple[int, int]]] = field(default_factory=list)

    def text(self, tokens: int) -> "Script":
        self.tokens += [Token(TEXT) for _ in range(tokens)]
        return self

    def start(self) -> "Script":
        self.tokens.append(Token(START))
        return self

    def end(self) -> "Script":
        self.tokens.append(Token(END))
        return self

    def image(self, rows: int, cols: int, **how) -> "Script":
        return self.item(Modality.IMAGE, rows, cols).frame(**how)

    def video(self, frames: int, rows: int, cols: int, **how) -> "Script":
        """Frames that touch."""
        self.item(Modality.VIDEO, rows, cols)
        for _ in range(frames):
            self.frame(**how)
        return self

    def item(self, modality: Modality, rows: int, cols: int) -> "Script":
        """What the next frames are frames of."""
        self.media.append((modality, (rows, cols)))
        return self

    def frame(self, *, newline: bool = False, end: str = "") -> "Script":
        """A frame of the last item. end: "" for none, "own" or "text": is the end one of the medium's tokens?"""
        item, (rows, cols) = len(self.media) - 1, self.media[-1][1]
        number = 1 + max((token.frame for token in self.tokens if token.item == item), default=-1)
        for row in range(rows):
            for col in range(cols):
                self.tokens.append(Token(None, item, number, row * cols + col, col))
            if newline:
                self.tokens.append(Token(None, item, number, Place.NEWLINE))
        if end:
            self.tokens.append(Token(LINE_END if end == "text" else None, item, number, Place.END_OF_FRAME))
        return self

    def closing(self) -> "Script":
        """A newline after the last frame."""
        self.tokens.append(Token(None, self.tokens[-1].item, self.tokens[-1].frame, Place.NEWLINE))
        return self

    def ids(self, *, hashed: bool = False) -> torch.Tensor:
        """With placeholders, or with hashes over the media's tokens, as SGLang has them at prefill."""
        numbers = [
            token.id
            if token.id is not None
            else (HASH + token.item if hashed else PLACEHOLDERS[self.media[token.item][0]])
            for token in self.tokens
        ]
        return torch.tensor(numbers)

    def offsets(self, *items: int) -> list[tuple[int, int]]:
        """(first, last) of the stretches of tokens that belong to the items, a stretch of each at a time."""
        owners = [token.item if token.id is None and token.item in items else None for token in self.tokens]
        firsts = [i for i, owner in enumerate(owners) if owner is not None and (not i or owners[i - 1] != owner)]
        lasts = [i for i, owner in enumerate(owners) if owner is not None and owners[i + 1 : i + 2] != [owner]]
        return list(zip(firsts, lasts))

    def medium(self, item: int, *, scale: int = 1) -> Medium:
        """With its grid, in units of 1 / scale of a token."""
        modality, (rows, cols) = self.media[item]
        frames = 1 + max(token.frame for token in self.tokens if token.item == item)
        return Medium(modality, (frames, rows * scale, cols * scale))

    def expected(self) -> dict[str, list[int]]:
        """The columns of the TokenMap."""
        rows, spans = [], -1
        for i in range(len(self.tokens)):
            row = self._row(i)
            spans += not rows or row[1] != rows[-1][1]
            rows.append((*row, spans))
        return {name: list(column) for name, column in zip(COLUMNS, zip(*rows))}

    def _row(self, i: int) -> tuple[int, int, int, int, int]:
        token = self.tokens[i]
        if token.item is not None:
            return self.media[token.item][0], token.item, token.frame, token.place, token.col
        before, after = self._neighbour(i, -1), self._neighbour(i, 1)
        place = Place.TEXT
        if token.id == START and i + 1 < len(self.tokens) and self.tokens[i + 1].item is not None:
            place = Place.VISION_START
        elif token.id == END and i and self.tokens[i - 1].item is not None:
            place = Place.VISION_END
        is_between = before is not None and after is not None and self.tokens[before].item == self.tokens[after].item
        if not is_between or after - before - 1 >= 64:
            return Modality.TEXT, -1, -1, place, -1
        follows = self.tokens[before if place == Place.VISION_END else after]
        joined = Place.TIMESTAMP if place == Place.TEXT else place
        return self.media[follows.item][0], follows.item, follows.frame, joined, -1

    def _neighbour(self, i: int, step: int) -> int | None:
        """Position of the next token of a medium in that direction."""
        while 0 <= i < len(self.tokens):
            if self.tokens[i].item is not None:
                return i
            i += step
        return None


def columns_of(token_map: TokenMap) -> dict[str, list[int]]:
    return {name: getattr(token_map, name).tolist() for name in COLUMNS}


def equal(a: TokenMap, b: TokenMap) -> bool:
    """All columns, their types, and the grids."""
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
    return same and a.grids == b.grids and all(getattr(a, n).dtype == getattr(b, n).dtype for n in COLUMNS)
