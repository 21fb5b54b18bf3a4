"""The pictures: a mask in prompt order beside the tiles in which kernels compute it, and a layer's masks side by side.

+-- title, density --------------------------------------------------+
|    spans, frames            |    lists of keys, side by side       |
|  s +--------+               |  f +------------+ +---+  rows        |
|  p |\\  parts of the mask    |  r |            | |   |              |
|  a | \\                      |  a +------------+ +---+              |
|  n |  \\  patterns, legend   |  m +------------+ +---+  dense rows  |
|  s +---+                    |  e +------------+ +---+              |
+-- legend, notes ---------------------------------------------------+
"""

from collections.abc import Sequence
from itertools import accumulate
from math import floor, log2
from pathlib import Path
from textwrap import wrap

import numpy as np
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import HeadPlan, KBoundary, NoBoundary
from sglang_mm.patterns.chosen import Unit
from sglang_mm.patterns.density import density
from sglang_mm.patterns.pictures.canvas import Scale, mask_pixels, scale_of
from sglang_mm.patterns.pictures.illustration import illustrate
from sglang_mm.patterns.pictures.parts import Part, part_of_pairs
from sglang_mm.patterns.pictures.permuted import Permuted, permuted, tiles_touched
from sglang_mm.patterns.pictures.sheet import CHARACTER, Sheet
from sglang_mm.patterns.pictures.views import (
    LINE,
    SMALL,
    CellsView,
    MaskView,
    ProgramView,
    modality_legend,
    part_names,
    pattern_lines,
    state_legend,
)
from sglang_mm.patterns.plan import Plan
from sglang_mm.types import TokenMap

LONGEST = 4096
"""Tokens of the longest prompt that can be drawn: memory is O(S * S), and more would not be seen."""
ILLUSTRATION = "Sets for illustration, evenly spaced; real ones are found per request."
TOP, AXIS, FOOT, COLUMN = 170, 70, 80, 780
"""Pixels: above the masks; below them, for axes; legend and note at the foot; and of a column of patterns."""
CAPTION = 16
SMALL_SIDE = 240
"""Pixels of a mask among others."""


def draw_plan(plan: Plan, layer: int, head: int | None, tokens: TokenMap, path: str | Path) -> Path:
    """Write a PNG of one query head of a plan, or of all heads of the layer, with sets that `illustrate` makes up.

    Raises ConfigError for a layer or head that the plan lacks, and as `draw_unit` does.
    """
    _within("layer", layer, plan.model.layers)
    name = f"{plan.model.name or plan.model.architecture}, layer {layer}"
    if head is None:
        units = {repr(each): illustrate(each, tokens) for _, each in plan.units(layer)}
        named = [(_name(heads, each), units[repr(each)]) for heads, each in plan.units(layer)]
        return draw_units(named, tokens, path, title=name, note=ILLUSTRATION)
    _within("head", head, plan.model.heads)
    [(heads, head_plan)] = [unit for unit in plan.units(layer) if head in unit[0]]
    title = f"{name}, {_name(heads, head_plan)}"
    return draw_unit(illustrate(head_plan, tokens), tokens, path, title=title, note=ILLUSTRATION)


def draw_unit(
    unit: Unit,
    tokens: TokenMap,
    path: str | Path,
    *,
    title: str,
    note: str = "",
    tile: int | None = None,
    told: Sequence[str] = (),
) -> Path:
    """Write a PNG of one unit's mask, as selected for a request, and of its tile programs.

    tile: rows and keys per tile of the programs, 1 .. 128; by default some 32 tiles cover the prompt. told: lines about
    the request, below the patterns.
    Raises ConfigError for a prompt of more than LONGEST tokens, without matplotlib, and for a file that cannot be
    written.
    """
    _check_length(tokens)
    tile = tile or default_tile(len(tokens))
    scale = scale_of(len(tokens))
    part_SS = part_of_pairs(unit, tokens)
    programs = permuted(unit, tokens, tile)
    shown = part_SS.cpu().numpy()
    views: list = [
        MaskView(unit, tokens, shown, scale),
        *(ProgramView(each, tokens, shown, scale) for each in programs),
    ]
    captions = _captions(part_SS, programs, tile)
    words = f"{len(tokens)} tokens, density {density(unit, tokens):.1%} of the causal pairs"
    notes = [note] * bool(note) + _pooled(scale) + ["Kernels take tiles of 64 or 128."] * (tile < 64)
    legend = [*modality_legend(tokens), *state_legend()]
    return compose(views, captions, pattern_lines(unit.panels), told, (title, words), legend, notes).save(path)


def compose(
    views: Sequence[MaskView | ProgramView | CellsView],
    captions: Sequence[str],
    patterns: Sequence[str],
    told: Sequence[str],
    heading: tuple[str, str],
    legend: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> Sheet:
    """A sheet of views side by side, and below them patterns in columns, lines of their own, legend and notes."""
    widths = [_width(view, caption) for view, caption in zip(views, captions)]
    width = sum(widths)
    columns = max(1, width // COLUMN)
    foot = TOP + max(len(view.pixels) for view in views) + AXIS
    below = foot + -(-len(patterns) // columns) * LINE
    told = [
        line for each in told for line in wrap(each, int((width - 40) / (SMALL * CHARACTER)), subsequent_indent="  ")
    ]
    sheet = Sheet(width, below + len(told) * LINE + FOOT)
    _head(sheet, *heading)
    for view, caption, x in zip(views, captions, accumulate([0, *widths])):
        sheet.text(x + view.margins[0], TOP - 80, caption, CAPTION)
        view.draw(sheet, x + view.margins[0], TOP)
    for number, line in enumerate(patterns):
        sheet.text(20 + number % columns * COLUMN, foot + number // columns * LINE, line, SMALL)
    for number, line in enumerate(told):
        sheet.text(20, below + number * LINE, line, SMALL)
    _foot(sheet, legend, " ".join(notes))
    return sheet


def draw_units(
    units: Sequence[tuple[str, Unit]], tokens: TokenMap, path: str | Path, *, title: str, note: str = ""
) -> Path:
    """Write a PNG of the masks of several units, small, each under its name. Raises ConfigError as `draw_unit` does."""
    _check_length(tokens)
    scale = scale_of(len(tokens), SMALL_SIDE, SMALL_SIDE)
    pixels, shares, present = {}, {}, set()
    for unit in dict.fromkeys(unit for _, unit in units):
        part_SS = part_of_pairs(unit, tokens).cpu().numpy()
        pixels[unit], shares[unit] = mask_pixels(part_SS, scale), density(unit, tokens)
        present |= set(np.unique(part_SS).tolist())
    named = [(name, f"density {shares[unit]:.1%}", pixels[unit]) for name, unit in units]
    words = f"{len(tokens)} tokens; density: share of the causal pairs"
    return compose_small(named, present, (title, words), [note] * bool(note) + _pooled(scale)).save(path)


def compose_small(
    named: Sequence[tuple[str, str, np.ndarray]], present: set[int], heading: tuple[str, str], notes: Sequence[str]
) -> Sheet:
    """A sheet of small masks: (name, words, pixels) of each. present: the parts that occur."""
    across = -(-len(named) // -(-len(named) // 7))  # rows of at most seven, equally long
    longest = max(len(words) for each in named for words in each[:2])
    side = max(len(pixels) for _, _, pixels in named)
    step_x, step_y = max(side, round(longest * SMALL * CHARACTER)) + 20, side + 60
    sheet = Sheet(max(across * step_x + 40, 1240), -(-len(named) // across) * step_y + 190)
    _head(sheet, *heading)
    for number, (name, words, pixels) in enumerate(named):
        x, y = 20 + number % across * step_x, 84 + number // across * step_y
        sheet.text(x, y, name, SMALL)
        sheet.text(x, y + LINE, words, SMALL)
        sheet.image(x, y + 2 * LINE + 4, pixels)
    entries = [(color, name) for part, color, name in part_names() if part in present]
    _foot(sheet, entries, " ".join(notes))
    return sheet


def default_tile(tokens: int) -> int:
    """A power of two, 16 .. 128, of which some 32 cover the prompt."""
    return int(min(128, max(16, 2 ** floor(log2(max(1, tokens / 32))))))


def _width(view: MaskView | ProgramView, caption: str) -> int:
    """Pixels that a view takes with all around it."""
    left, right = view.margins
    return left + max(view.pixels.shape[1] + right, round(len(caption) * CAPTION * CHARACTER))


def _captions(part_SS: Tensor, programs: Sequence[Permuted], tile: int) -> list[str]:
    blocks = -(-len(part_SS) // tile)
    size = f"{tile} x {tile}"
    touched = tiles_touched(part_SS != Part.UNSEEN, tile)
    captions = [f"In order of the prompt: touches {touched} of {blocks * (blocks + 1) // 2} causal tiles of {size}"]
    for number, program in enumerate(programs):
        what = "As computed" if number == 0 else "Class differences (slash)"
        visits = program.full + program.partial
        captions.append(f"{what}: {visits} tiles of {size}, {program.full} full and {program.partial} partial")
    return captions


def _head(sheet: Sheet, title: str, words: str) -> None:
    sheet.text(20, 14, title, 22, weight="bold")
    sheet.text(20, 48, words, CAPTION)


def _foot(sheet: Sheet, entries: Sequence[tuple[str, str]], note: str) -> None:
    x = 20.0
    for color, name in entries:
        sheet.swatch(x, sheet.height - 62, color)
        sheet.text(x + 20, sheet.height - 62, name, SMALL)
        x += 20 + len(name) * SMALL * CHARACTER + 16
    sheet.text(20, sheet.height - 34, note, SMALL, style="italic")


def _pooled(scale: Scale) -> list[str]:
    return [f"A dot stands for {scale.pool} x {scale.pool} pairs, and is coloured if any is seen."] * (scale.pool > 1)


def _name(heads: tuple[int, ...], head_plan: HeadPlan) -> str:
    tag = head_plan.__struct_config__.tag
    if isinstance(head_plan, NoBoundary | KBoundary):
        tag = f"{head_plan.pattern.__struct_config__.tag}"
    return f"head {heads[0]}: {tag}" if len(heads) == 1 else f"heads {heads[0]}-{heads[-1]}: {tag}"


def _check_length(tokens: TokenMap) -> None:
    if len(tokens) > LONGEST:
        remedy = "draw a shorter prompt: fewer or smaller frames show the same lines"
        raise ConfigError(f"a picture of {len(tokens)} tokens", f"up to {LONGEST}", remedy)


def _within(name: str, given: int, count: int) -> None:
    if not 0 <= given < count:
        raise ConfigError(f"{name} {given}", f"0 to {count - 1}", "count from 0")
