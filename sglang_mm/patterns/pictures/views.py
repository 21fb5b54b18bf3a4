"""What stands on a sheet: a mask in prompt order, and one tile program, each with bands, axes and legend.

x, y: pixels, of the upper left corner of the mask itself; bands and labels lie outside of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sglang_mm.patterns.chosen import Panel, Phases, Unit
from sglang_mm.patterns.pictures import canvas
from sglang_mm.patterns.pictures.canvas import Scale
from sglang_mm.patterns.pictures.parts import Part
from sglang_mm.patterns.pictures.permuted import Permuted
from sglang_mm.patterns.pictures.pooled import Cells
from sglang_mm.patterns.pictures.sheet import CHARACTER, POINTS, Sheet
from sglang_mm.types import Modality, TokenMap

SPANS, FRAMES, APART = 20, 10, 3
"""Pixels: bands of spans and of frames, and what lies between them."""
BANDS = SPANS + FRAMES + 2 * APART
SMALL, LINE = 14, 19
"""Pixels: letters, and from line to line."""
MOST_OUTLINES = 60
"""Between panels; more would hide the mask."""
OUTLINE = {"color": "#000000", "linewidth": 0.9, "linestyle": (0, (4, 2))}


class _MaskSheet:
    """Rows against keys of a prompt, in its order: what both views below do with their pixels.

    counts: (pairs of each part, causal pairs), all of them or those that were looked at.
    """

    unit: Unit
    tokens: TokenMap
    scale: Scale
    rows: range
    keys: range
    pixels: np.ndarray
    counts: tuple[np.ndarray, int]

    @property
    def margins(self) -> tuple[int, int]:
        """Pixels to the left and to the right, for bands and words."""
        return BANDS + 80, 30

    def draw(self, sheet: Sheet, x: int, y: int) -> None:
        height, side = self.pixels.shape[:2]
        sheet.image(x, y, self.pixels)
        rows, keys, pixel = self.rows, self.keys, self.scale.zoom / self.scale.pool
        sides = [
            (canvas.frame_codes(self.tokens, np.array(each)), np.arange(len(each)), len(each)) for each in (keys, rows)
        ]
        _frame_bands(sheet, x, y, *sides, self.scale)
        self._spans(sheet, x, y)
        axes = sheet.axes(x, y, side, height, side / pixel, height / pixel)
        axes.set_xlim(keys.start, keys.start + side / pixel)
        axes.set_ylim(rows.start + height / pixel, rows.start)
        axes.spines["left"].set_position(("outward", (BANDS + 1) * POINTS))
        axes.spines["bottom"].set_position(("outward", 2 * POINTS))
        axes.set_xlabel("position of the key", fontsize=SMALL * POINTS)
        axes.set_ylabel("position of the query", fontsize=SMALL * POINTS)
        self._outline(axes)
        for number, (color, name) in enumerate(self._shares()):
            sheet.swatch(x + side - 200, y + 12 + number * LINE, color)
            sheet.text(x + side - 180, y + 12 + number * LINE, name, SMALL)

    def _spans(self, sheet: Sheet, x: int, y: int) -> None:
        """A band with names where there is room, above the mask and to its left."""
        pixel = self.scale.zoom / self.scale.pool
        how = {"color": "white", "ha": "center", "va": "center_baseline", "rotation_mode": "anchor"}
        for name, modality, start, stop in _spans(self.tokens):
            color = canvas.MODALITIES[modality]
            for is_above, shown in ((True, self.keys), (False, self.rows)):
                low, high = max(start, shown.start) - shown.start, min(stop, shown.stop) - shown.start
                if low >= high:
                    continue
                first, size = round(low * pixel), max(1, round(high * pixel) - round(low * pixel))
                has_room = len(name) * SMALL * CHARACTER < size
                if is_above:
                    sheet.box(x + first, y - BANDS, size, SPANS, facecolor=color, linewidth=0)
                    if has_room:
                        sheet.text(x + first + size / 2, y - BANDS + SPANS / 2, name, SMALL, **how)
                else:
                    sheet.box(x - BANDS, y + first, SPANS, size, facecolor=color, linewidth=0)
                    if has_room:
                        sheet.text(x - BANDS + SPANS / 2, y + first + size / 2, name, SMALL, rotation=90, **how)

    def _outline(self, axes) -> None:
        """Lines between panels, where the modality of rows or of keys changes."""
        modality, rows, keys = self.tokens.modality.cpu(), self.rows, self.keys
        changes = ((modality[1:] != modality[:-1]).nonzero().flatten() + 1).tolist()
        if len(changes) > MOST_OUTLINES:
            return
        for at in changes:
            if any(panel.rows is not None for panel in self.unit.panels) and at in rows:
                axes.plot([keys.start, max(keys.start, min(at, keys.stop))], [at, at], **OUTLINE)
            if any(panel.keys is not None for panel in self.unit.panels) and at in keys:
                axes.plot([at, at], [min(rows.stop, max(at, rows.start)), rows.stop], **OUTLINE)

    def _shares(self) -> list[tuple[str, str]]:
        """(color, name with its share of the causal pairs) of each part that occurs."""
        counts, causal = self.counts
        return [(color, f"{name} {counts[part] / causal:.1%}") for part, color, name in part_names() if counts[part]]


@dataclass(frozen=True, eq=False)
class MaskView(_MaskSheet):
    """part_SS: uint8 [S, S] of Part."""

    unit: Unit
    tokens: TokenMap
    part_SS: np.ndarray
    scale: Scale

    @cached_property
    def pixels(self) -> np.ndarray:
        return canvas.mask_pixels(self.part_SS, self.scale)

    @property
    def rows(self) -> range:
        return range(len(self.tokens))

    keys = rows

    @property
    def counts(self) -> tuple[np.ndarray, int]:
        counts = np.bincount(self.part_SS.ravel(), minlength=len(Part))
        return counts, len(self.tokens) * (len(self.tokens) + 1) // 2


@dataclass(frozen=True, eq=False)
class CellsView(_MaskSheet):
    """A window of the prompt, in cells of several pairs. unit: whose panels are outlined."""

    unit: Unit
    tokens: TokenMap
    cells: Cells
    scale: Scale
    rows: range
    keys: range

    @cached_property
    def pixels(self) -> np.ndarray:
        return canvas.cell_pixels(self.cells.part, self.cells.share, self.scale.zoom)

    @property
    def counts(self) -> tuple[np.ndarray, int]:
        return self.cells.counts, max(1, self.cells.causal)


@dataclass(frozen=True, eq=False)
class ProgramView:
    program: Permuted
    tokens: TokenMap
    part_SS: np.ndarray
    scale: Scale

    @cached_property
    def pixels(self) -> np.ndarray:
        rows, keys = self.program.rows.cpu().numpy(), self.program.keys.cpu().numpy()
        sizes = [[size for _, size in groups] for groups in (self.program.row_groups, self.program.key_groups)]
        part_RN = self.part_SS[rows[:, None], keys]
        return canvas.program_pixels(part_RN, self.program.state_RN.cpu().numpy(), *sizes, self.scale)

    @property
    def margins(self) -> tuple[int, int]:
        """Pixels to the left and to the right, for bands and words."""
        longest = max(len(f"{name} ({size})") for name, size in self.program.row_groups)
        return 60, 20 + round(longest * SMALL * CHARACTER)

    def draw(self, sheet: Sheet, x: int, y: int) -> None:
        sheet.image(x, y, self.pixels)
        sides = []
        for positions, groups in (
            (self.program.keys, self.program.key_groups),
            (self.program.rows, self.program.row_groups),
        ):
            place_N, length = canvas.places([size for _, size in groups], self.scale)
            sides.append((canvas.frame_codes(self.tokens, positions.cpu().numpy()), place_N, length))
        _frame_bands(sheet, x, y, *sides, self.scale)
        self._names(sheet, x, y)
        height = len(self.pixels)
        sheet.text(x, y + height + 8, "keys, list by list", SMALL)
        sheet.text(x - FRAMES - 2 * APART, y, "rows, tile by tile", SMALL, ha="right", rotation=90)

    def _names(self, sheet: Sheet, x: int, y: int) -> None:
        """Of lists of keys above, of rows to the right; a name without room goes a line further out."""
        reached = [-1.0] * 9
        for name, start, _ in self._starts(self.program.key_groups):
            level = next(n for n, end in enumerate(reached) if end < start)
            reached[level] = start + len(name) * SMALL * CHARACTER
            sheet.text(x + start, y - FRAMES - 2 * APART - level * LINE, name, SMALL, va="bottom")
        lowest = -1.0 * LINE
        for name, start, stop in self._starts(self.program.row_groups):
            lowest = max(lowest + LINE, (start + stop) / 2)
            sheet.text(x + self.pixels.shape[1] + 6, y + lowest, name, SMALL, va="center")

    def _starts(self, groups: Iterable[tuple[str, int]]) -> list[tuple[str, float, float]]:
        """(name, first pixel, end) of each group."""
        found, start, pixel = [], 0, self.scale.zoom / self.scale.pool
        for name, size in groups:
            length = -(-size // self.scale.pool) * self.scale.pool
            found.append((f"{name} ({size})", start * pixel, (start + length) * pixel))
            start += length + self.scale.gap
        return found


def part_names() -> list[tuple[Part, str, str]]:
    """(part, color, name) of everything that can be seen."""
    return [(part, canvas.COLORS[part], part.name.lower().replace("_", " ")) for part in Part if part != Part.UNSEEN]


def state_legend() -> list[tuple[str, str]]:
    dark = "#" + bytes((canvas.rgb(canvas.COLORS[Part.WINDOW]) * canvas.FULL_SHADE).astype(np.uint8)).hex()
    return [
        (dark, "dark: full tile, no mask"),
        (canvas.COLORS[Part.WINDOW], "light: seen in a partial tile"),
        (canvas.HIDDEN, "computed, then hidden"),
        (canvas.COLORS[Part.UNSEEN], "not computed"),
    ]


def modality_legend(tokens: TokenMap) -> list[tuple[str, str]]:
    found = [(canvas.MODALITIES[modality], modality.name.lower()) for modality in tokens.modalities]
    return [*found, (canvas.SEPARATOR, "separator")] if bool(tokens.separators.any()) else found


def pattern_lines(panels: Iterable[Panel]) -> list[str]:
    """One line per panel."""
    lines = []
    for panel in panels:
        sides = [side for side in (panel.rows, panel.keys) if side is not None]
        where = " to ".join(side.name.lower() for side in sides)
        numbers = {name: getattr(panel.pattern, name) for name in panel.pattern.__struct_fields__}
        if isinstance(panel.chosen, Phases):
            numbers["axis"] = panel.chosen.axis.value
        shown = [name if value is True else f"{name} {value}" for name, value in numbers.items() if value is not False]
        words = [f"{where}:"] * bool(where) + [panel.pattern.__struct_config__.tag]
        lines.append(" ".join([*words, f"({', '.join(shown)})" if shown else ""]))
    return lines


def _frame_bands(sheet: Sheet, x: int, y: int, keys, rows, scale: Scale) -> None:
    """keys, rows: (frame codes, their places, length of the side in pairs)."""
    sheet.image(x, y - FRAMES - APART, canvas.band_pixels(*keys, FRAMES, scale))
    sheet.image(x - FRAMES - APART, y, canvas.band_pixels(*rows, FRAMES, scale).swapaxes(0, 1))


def _spans(tokens: TokenMap) -> list[tuple[str, Modality, int, int]]:
    """(name, modality, start, stop) of each span."""
    starts = torch.nn.functional.pad(tokens.span.cpu().diff().nonzero().flatten() + 1, (1, 0)).tolist()
    found = []
    for start, stop in zip(starts, [*starts[1:], len(tokens)]):
        modality, item = Modality(int(tokens.modality[start])), int(tokens.item[start])
        name = modality.name.lower()
        found.append((name if item < 0 else f"{name} {item}", modality, start, stop))
    return found
