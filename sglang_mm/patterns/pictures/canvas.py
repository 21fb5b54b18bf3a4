"""Masks and tile programs as pixels: colours, pooling, bands of modalities. Arrays in, arrays out.

Colours are those of Okabe and Ito and of Tol, which colour-blind people tell apart. h, w: pixels; 3: red, green, blue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from sglang_mm.patterns.pictures.parts import Part
from sglang_mm.patterns.pictures.permuted import State
from sglang_mm.types import Modality, TokenMap

LARGEST_SIDE = 1024
"""Cells of a picture's side; longer prompts are pooled."""
PIXELS = 900
"""About what the side of a mask takes; cells of short prompts are several pixels wide."""
GAP = 8
"""Pixels between two lists of keys, or of rows."""

COLORS = {
    Part.UNSEEN: "#efefef",
    Part.BLOCKS: "#f0e442",
    Part.WINDOW: "#56b4e9",
    Part.SINK: "#cc79a7",
    Part.DENSE_ROWS: "#009e73",
    Part.SLASH: "#d55e00",
    Part.LINES: "#0072b2",
    Part.SEPARATORS: "#e69f00",
}
MODALITIES = {Modality.TEXT: "#8c8c8c", Modality.IMAGE: "#aa4499", Modality.VIDEO: "#332288"}
HIDDEN, BACKGROUND, SEPARATOR = "#bdbdbd", "#ffffff", "#000000"
FAINTEST = 0.3
"""Strength of a colour where next to no pair of a cell is seen."""
FULL_SHADE = 0.68
"""Factor on the colour of what a full tile shows."""


@dataclass(frozen=True)
class Scale:
    """pool x pool pairs are one cell, and a cell is zoom x zoom pixels."""

    pool: int
    zoom: int

    @property
    def gap(self) -> int:
        """In pairs; a multiple of pool."""
        return ceil(GAP / self.zoom) * self.pool


def scale_of(tokens: int, largest: int = LARGEST_SIDE, pixels: int = PIXELS) -> Scale:
    pool = 1
    while tokens > pool * largest:
        pool *= 2
    return Scale(pool, max(1, round(pixels * pool / tokens)))


def rgb(color: str) -> np.ndarray:
    """uint8 [3], from `#rrggbb`."""
    return np.frombuffer(bytes.fromhex(color[1:]), dtype=np.uint8)


def mask_pixels(part_SS: np.ndarray, scale: Scale) -> np.ndarray:
    """uint8 [h, w, 3]. part_SS: uint8 [S, S] of Part; what lies above the diagonal is background."""
    table = np.stack([rgb(COLORS[part]) for part in Part] + [rgb(BACKGROUND)])
    above = np.triu(np.ones_like(part_SS, dtype=bool), 1)
    pooled, is_above = _pool(part_SS, scale.pool, 0), _pool(~above, scale.pool, 0) == 0
    return _zoom(table[np.where(is_above, len(Part), pooled)], scale.zoom)


def cell_pixels(part: np.ndarray, share: np.ndarray, zoom: int) -> np.ndarray:
    """uint8 [h, w, 3]: the colour of each cell's part, paler where fewer of its pairs are seen. As in `Cells`."""
    colors = np.stack([rgb(COLORS[each]) for each in Part]).astype(np.float32)
    strength = np.where(part == Part.UNSEEN, 0, FAINTEST + (1 - FAINTEST) * np.sqrt(np.nan_to_num(share)))[..., None]
    pixels = colors[Part.UNSEEN] + (colors[part] - colors[Part.UNSEEN]) * strength
    pixels[np.isnan(share)] = rgb(BACKGROUND)
    return _zoom(pixels.round().astype(np.uint8), zoom)


def program_pixels(
    part_RN: np.ndarray, state_RN: np.ndarray, rows: Sequence[int], keys: Sequence[int], scale: Scale
) -> np.ndarray:
    """uint8 [h, w, 3]: the part where a pair is seen, darker in full tiles. rows, keys: sizes of groups, set apart."""
    row_R, height = places(rows, scale)
    key_N, width = places(keys, scale)
    outside = len(State)
    state = np.full((height, width), outside, dtype=np.uint8)
    part = np.zeros_like(state)
    state[row_R[:, None], key_N] = state_RN
    part[row_R[:, None], key_N] = np.where(state_RN >= State.PARTIAL, part_RN, Part.UNSEEN)

    colors = np.stack([rgb(COLORS[each]) for each in Part])
    same = np.ones((len(Part), 1), dtype=np.uint8)
    by_state = {
        State.SKIPPED: same * rgb(COLORS[Part.UNSEEN]),
        State.HIDDEN: same * rgb(HIDDEN),
        State.PARTIAL: colors,
        State.FULL: (colors * FULL_SHADE).astype(np.uint8),
    }
    table = np.stack([*(by_state[each] for each in State), same * rgb(BACKGROUND)])
    pooled = _pool(np.where(state == outside, 0, state), scale.pool, 0)
    is_outside = _pool(state != outside, scale.pool, 0) == 0
    return _zoom(table[np.where(is_outside, outside, pooled), _pool(part, scale.pool, 0)], scale.zoom)


def places(sizes: Sequence[int], scale: Scale) -> tuple[np.ndarray, int]:
    """(int64, place of each member of groups of these sizes; length with gaps), in pairs."""
    found, start = [], 0
    for size in sizes:
        found.append(np.arange(start, start + size))
        start += ceil(size / scale.pool) * scale.pool + scale.gap
    return np.concatenate(found), start - scale.gap


def frame_codes(tokens: TokenMap, positions: np.ndarray) -> np.ndarray:
    """int64: of the token at each position, its row in `frame_colors`. Neighbouring frames differ."""
    modality = tokens.modality.cpu().numpy().astype(np.int64)[positions]
    frame = tokens.frame.cpu().numpy()[positions]
    is_separator = tokens.separators.cpu().numpy()[positions]
    return np.where(is_separator, 1 + 2 * len(Modality), 1 + 2 * modality + (frame > 0) * (frame % 2))


def band_pixels(code_N: np.ndarray, place_N: np.ndarray, length: int, thick: int, scale: Scale) -> np.ndarray:
    """uint8 [thick, w, 3]: the frame codes of a side, at their places. Separators stay visible when pooled."""
    light = [(rgb(color) * 0.45 + 255 * 0.55).astype(np.uint8) for color in MODALITIES.values()]
    dark = [rgb(color) for color in MODALITIES.values()]
    both = [color for pair in zip(dark, light) for color in pair]
    table = np.stack([rgb(BACKGROUND), *both, rgb(SEPARATOR)])
    code = np.zeros(length + -length % scale.pool, dtype=np.int64)
    code[place_N] = code_N
    pooled = code.reshape(1, -1, scale.pool).max(2)
    return table[pooled.repeat(scale.zoom, 1)].repeat(thick, 0)


def _pool(values: np.ndarray, pool: int, fill: int) -> np.ndarray:
    """The largest of each pool x pool values."""
    pad = [(0, -size % pool) for size in values.shape]
    padded = np.pad(values, pad, constant_values=fill)
    height, width = (size // pool for size in padded.shape)
    return padded.reshape(height, pool, width, pool).max((1, 3))


def _zoom(pixels: np.ndarray, zoom: int) -> np.ndarray:
    return pixels.repeat(zoom, 0).repeat(zoom, 1)
