"""Prompts as TokenMaps, without a model: fixed geometries by name, and a hypothesis strategy for random ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sglang_mm.modality.token_map import Item, Wraps, build_token_map, frame_places
from sglang_mm.types import Modality, TokenMap

TEXT_ID, START_ID, END_ID, PAD_ID = 7, 101, 102, 103
WRAPS = Wraps(START_ID, END_ID)


@dataclass
class Prompt:
    """Ids and items of a prompt that is written from left to right."""

    ids: list[int] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def text(self, tokens: int) -> "Prompt":
        self.ids += [TEXT_ID] * tokens
        return self

    def media(
        self, modality: Modality, frames: int, rows: int, cols: int, *,
        newline: bool = False, end: int = 0, gaps: Sequence[int] = (), wrapped: bool = False,
    ) -> "Prompt":  # fmt: skip
        """gaps: tokens of text before frames 1, 2, ... (none: frames touch). wrapped: vision start and end around.

        Wraps come around every frame that has a gap before it, else around the item; they add to the gap.
        """
        places = frame_places(rows, cols, newline=newline, end=end)
        gaps, starts = [0, *gaps, *[0] * (frames - 1 - len(gaps))], []
        for number, gap in enumerate(gaps):
            if wrapped and gap and number:
                self.ids.append(END_ID)
            self.text(gap)
            if wrapped and (gap or not number):
                self.ids.append(START_ID)
            starts.append(len(self.ids))
            self.ids += [PAD_ID] * len(places)
        if wrapped:
            self.ids.append(END_ID)
        self.items.append(Item(modality, (rows, cols), torch.tensor(starts), places))
        return self

    def image(self, rows: int, cols: int, **how) -> "Prompt":
        return self.media(Modality.IMAGE, 1, rows, cols, **how)

    def video(self, frames: int, rows: int, cols: int, **how) -> "Prompt":
        return self.media(Modality.VIDEO, frames, rows, cols, **how)

    def token_map(self) -> TokenMap:
        return build_token_map(torch.tensor(self.ids), self.items, WRAPS)


def tiny_mixed() -> TokenMap:
    """510 tokens: text, 9 x (5 x 7) with newlines, text, an image of 6 x 4, text, 4 x (3 x 5) with timestamps, text."""
    prompt = Prompt().text(17).video(9, 5, 7, newline=True).text(11).image(6, 4, wrapped=True)
    return prompt.text(1).video(4, 3, 5, gaps=[3, 4, 5], wrapped=True).text(15).token_map()


def text_only(tokens: int = 200) -> TokenMap:
    return Prompt().text(tokens).token_map()


def uniform_video(frames: int = 12, rows: int = 4, cols: int = 6, *, newline=False, end: int = 0) -> TokenMap:
    """20 tokens of text, a video without anything between its frames, 30 tokens of text."""
    return Prompt().text(20).video(frames, rows, cols, newline=newline, end=end).text(30).token_map()


def timestamped_video(frames: int = 8, rows: int = 4, cols: int = 6) -> TokenMap:
    """20 tokens of text, frames with 3, 4, 5, 3, 4, ... tokens of text between them and wraps, 30 tokens of text."""
    gaps = [3 + number % 3 for number in range(frames - 1)]
    return Prompt().text(20).video(frames, rows, cols, gaps=gaps, wrapped=True).text(30).token_map()


def two_videos(same_size: bool) -> TokenMap:
    """Videos of 5 x (4 x 6) and 4 x (4 x 6), or 4 x (3 x 5), with 9 tokens of text before, between and after."""
    second = (4, 4, 6) if same_size else (4, 3, 5)
    return Prompt().text(9).video(5, 4, 6).text(9).video(*second).text(9).token_map()


def interleaved() -> TokenMap:
    """A chat: text, image, text, video, long text, image right after it, video to the end of the prompt."""
    prompt = Prompt().text(12).image(3, 5, wrapped=True).text(8).video(4, 3, 4, gaps=[2, 2, 2], wrapped=True)
    return prompt.text(90).image(3, 5).video(3, 4, 4, newline=True).token_map()


def token_maps(max_tokens: int = 400):
    """A hypothesis strategy: prompts of 1 to max_tokens tokens, of text, images and videos of all layouts."""
    from hypothesis import strategies as st

    texts = st.one_of(st.integers(0, 12), st.integers(0, 80))

    @st.composite
    def build(draw) -> TokenMap:
        prompt = Prompt().text(draw(texts))
        for _ in range(draw(st.integers(0, 4))):
            saved = len(prompt.ids), len(prompt.items)
            _draw_media(draw, st, prompt)
            prompt.text(draw(texts))
            if len(prompt.ids) > max_tokens:
                del prompt.ids[saved[0] :], prompt.items[saved[1] :]
        if not prompt.ids:
            prompt.text(1)
        del prompt.ids[max_tokens:]  # text alone: media that went too far are gone
        return prompt.token_map()

    return build()


def _draw_media(draw, st, prompt: Prompt) -> None:
    rows, cols = draw(st.sampled_from([(1, 1), (1, 5), (3, 4), (4, 3), (4, 6)]))
    how = {"newline": draw(st.booleans()), "end": draw(st.sampled_from([0, 0, 1])), "wrapped": draw(st.booleans())}
    if draw(st.booleans()):
        prompt.image(rows, cols, **how)
    else:
        frames = draw(st.integers(1, 9))
        gap = st.sampled_from([0, 3, 4, 5, 61, 62, 63, 64])
        gaps = draw(st.one_of(st.just([]), st.lists(gap, min_size=frames - 1, max_size=frames - 1)))
        prompt.video(frames, rows, cols, gaps=gaps, **how)
