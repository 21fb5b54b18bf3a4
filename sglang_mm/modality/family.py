"""What a model family is to this room: how the tokens of one image or video are laid out, and nothing else.

A family answers one question: of how many frames of how many rows and columns a medium is made, and what each token of
a frame is. Where the frames lie comes from the doors (doors.py), and what stands between them from the prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.modality.token_map import frame_places
from sglang_mm.types import Modality, Place


@dataclass(frozen=True)
class Medium:
    """What a processor says of one image or video. grid: (frames, rows, columns) in the unit of the family, or None.

    Raises ConfigError for text.
    """

    modality: Modality
    grid: tuple[int, int, int] | None = None

    def __post_init__(self):
        if self.modality == Modality.TEXT:
            raise ConfigError("a medium of text", "image, video", "leave text out: it is what no medium covers")

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid)) if self.grid else "unknown"
        return f"{'an' if self.modality == Modality.IMAGE else 'a'} {self.modality.name.lower()} of grid {grid}"


@dataclass(frozen=True, eq=False)
class Part:
    """Frames of one size. A medium has one part, unless it is encoded at two sizes.

    places int32 [n]: what each token of a frame is, as in `TokenMap.place`. beside: how many tokens at the end of each
    frame are ordinary text to the processor, so that they are not among the medium's tokens. closing: tokens after the
    last frame.
    """

    frames: int
    grid: tuple[int, int]
    places: Tensor
    beside: int = 0
    closing: tuple[Place, ...] = ()

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame that are the medium's own."""
        return len(self.places) - self.beside

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens + len(self.closing)


class Family(ABC):
    """name: ours. models: the architectures and model types of Hugging Face configurations that it serves."""

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]

    @abstractmethod
    def parts(self, medium: Medium, runs: Sequence[int] | None) -> list[Part]:
        """How the medium's tokens are laid out, in prompt order.

        runs: lengths of the stretches of tokens that are the medium's; None when only the grid can tell its length.
        Raises ConfigError when grid and runs do not determine the layout, or contradict it.
        """

    def unknown(self, medium: Medium, runs: Sequence[int] | None, allowed: str) -> ConfigError:
        """The error of a medium whose layout cannot be told."""
        tokens = "" if runs is None else f" in {sum(runs)} tokens"
        return ConfigError(f"{medium}{tokens} for {self.name}", allowed, "pass the grid that the processor reported")


def checked_grid(family: Family, medium: Medium, unit: int = 1) -> tuple[int, int, int]:
    """(frames, rows, columns) in tokens, from a grid in units of 1 / unit. Raises ConfigError if it does not divide."""
    frames, rows, cols = medium.grid
    if min(frames, rows, cols) < 1 or rows % unit or cols % unit:
        raise family.unknown(medium, None, f"a grid of at least 1, rows and columns multiples of {unit}")
    return frames, rows // unit, cols // unit


def square_frames(
    family: Family, medium: Medium, runs: Sequence[int] | None, side: int, *, newline: bool = False
) -> Part:
    """Frames of side x side, as many as the grid says, or as fill the runs."""
    places = frame_places(side, side, newline=newline)
    if medium.grid is not None:
        frames, *shape = checked_grid(family, medium)
        if shape != [side, side]:
            raise family.unknown(medium, runs, f"frames of {side} x {side}")
    else:
        frames = sum(runs or ()) // len(places)
        if not frames or frames * len(places) != sum(runs):
            raise family.unknown(medium, runs, f"{len(places)} tokens a frame")
    return Part(frames, (side, side), places)
