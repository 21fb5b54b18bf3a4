"""The prompt of a dry run, laid out: which rank computes which rows, encodes which frames, keeps which pages."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.vision import split_frames
from sglang_mm.plan.geometry import LARGEST, parse_geometry
from sglang_mm.types import Frame, Layout, Modality, Residence, Run, TokenMap
from sglang_mm.types.residence import page_for

BEFORE, AFTER = 15, 25
"""Text around the video: Qwen2.5-VL's chat template, and a question."""
SIDE = 16
"""Frames of 16 x 16 tokens: 448 x 448 pixels."""


def describe(tokens: int) -> str:
    """One video that fills a prompt of so many tokens, with a short text before it and a question after it."""
    if not 1 <= tokens <= LARGEST:
        raise ConfigError(f"--tokens {tokens}", f"1 to {LARGEST}", "pass the length of the prompt")
    frames = (tokens - BEFORE - AFTER) // SIDE**2
    if frames < 1:
        return f"text:{tokens}"
    return f"text:{BEFORE},video:{frames}x{SIDE}x{SIDE},text:{tokens - BEFORE - frames * SIDE**2}"


@dataclass(frozen=True)
class RankShare:
    """What one of the C replicas does. stretches: of neighbouring rows. pairs: (query, key) pairs of dense attention.
    media: tokens among its rows; frames: tokens it encodes. kept: rows of K/V that rest here.
    """

    rank: int
    rows: int
    stretches: int
    pairs: int
    media: int
    frames: int
    kept: int


@dataclass(frozen=True, eq=False)
class LaidOut:
    """page: tokens of a page, all ranks' parts together; pages: of the prompt."""

    tokens: TokenMap
    layout: Layout
    shares: tuple[RankShare, ...]
    page: int
    pages: int

    @property
    def largest(self) -> int:
        return max(share.rows for share in self.shares)


def lay_out(tokens: TokenMap, config: Config, page: int | None = None) -> LaidOut:
    """On the C replicas of the configuration. page: tokens of a page, as --page-size; None: as the server would take.

    Raises ConfigError for a page that the replicas cannot share evenly.
    """
    runs = runs_of_map(tokens)
    layout = make_layout(runs, config.cp)
    encoded = split_frames(found := frames_of_runs(runs), config.cp)
    page = page or (page_for(config.cp) if config.keepers > 1 else 1)
    pages, is_media, pairs = -(-len(tokens) // page), tokens.modality != Modality.TEXT, layout.attended_pairs()
    shares = tuple(
        RankShare(
            rank=rank,
            rows=len(rows),
            stretches=_stretches(rows),
            pairs=pairs[rank],
            media=int(is_media[rows].sum()),
            frames=sum(found[i].length for i in encoded[rank]),
            kept=Residence(config.keepers, rank % config.keepers, page).held(len(tokens)),
        )
        for rank, rows in enumerate(layout.rows)
    )
    return LaidOut(tokens, layout, shares, page, pages)


def runs_of_map(tokens: TokenMap) -> list[Run]:
    """A run per span; one of frames that are not equally long counts as a single frame."""
    _, lengths = tokens.span.unique_consecutive(return_counts=True)
    runs = []
    for start, stop in pairwise([0, *lengths.cumsum(0).tolist()]):
        modality = Modality(int(tokens.modality[start]))
        shown = tokens.frame[start:stop]
        frames = 1 if modality == Modality.TEXT else int(shown.max()) - int(shown[shown >= 0].min()) + 1
        equal = frames if (stop - start) % frames == 0 else 1
        runs.append(Run(start, stop - start, equal, modality.name.lower()))
    return runs


def frames_of_runs(runs: list[Run]) -> list[Frame]:
    """What the vision tower encodes, in order."""
    return [
        Frame(item, index, run.start + index * (run.length // run.frames), run.length // run.frames)
        for item, run in enumerate(run for run in runs if run.modality != "text")
        for index in range(run.frames)
    ]


def prompt_of(tokens: int | None, description: str | None) -> tuple[str, TokenMap]:
    """(description, map) of what was asked for. Raises ConfigError for neither, or for two that differ."""
    if tokens is None and description is None:
        raise ConfigError("--dry-run without a prompt", "--tokens N or --prompt", "pass --tokens 1048576")
    text = description or describe(tokens)
    made = parse_geometry(text)
    if tokens is not None and len(made) != tokens:
        given = f"--tokens {tokens} and --prompt {text}, of {len(made)} tokens"
        raise ConfigError(given, "two that agree", "leave --tokens out")
    return text, made


def _stretches(rows: Tensor) -> int:
    return int((torch.diff(rows) > 1).sum()) + 1 if len(rows) else 0
