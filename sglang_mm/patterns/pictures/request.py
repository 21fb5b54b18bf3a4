"""What a request really did, drawn: one head of a layer, whole or a window of it, or all heads of the layer, small."""

from collections.abc import Sequence
from pathlib import Path

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.chosen import Unit
from sglang_mm.patterns.pictures.canvas import cell_pixels, scale_of
from sglang_mm.patterns.pictures.draw import LONGEST, SMALL_SIDE, compose, compose_small, draw_unit
from sglang_mm.patterns.pictures.parts import Part, UnitParts
from sglang_mm.patterns.pictures.pooled import MOST_PAIRS, Cells, Chunk, pool_pairs
from sglang_mm.patterns.pictures.views import CellsView, modality_legend, pattern_lines
from sglang_mm.patterns.select.report import Verdict
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, PackedLayer

MOST_LINES = 12
"""Verdicts under a picture; of more, those of the lowest recall."""
PALER = "Paler: fewer pairs of a dot are seen."

Layer = KeptLayer | PackedLayer


def layer_of(kept: KeptRequest, layer: int) -> list[Layer]:
    """That layer of each chunk. Raises ConfigError where the file has none of that number."""
    found = [each for of_chunk in kept.layers for each in of_chunk if each.layer == layer]
    if len(found) != len(kept.chunks):
        numbers = sorted({each.layer for of_chunk in kept.layers for each in of_chunk})
        raise ConfigError(f"layer {layer}", ", ".join(map(str, numbers)), "name a layer that was kept")
    return found


def draw_request(
    kept: KeptRequest,
    layer: int,
    head: int | None,
    path: str | Path,
    *,
    rows: range | None = None,
    keys: range | None = None,
) -> Path:
    """Write a PNG of a layer's head, or of all its heads, small. rows, keys: of one head, positions to show.

    A prompt of up to LONGEST tokens in one chunk is drawn beside its tile programs; a longer one, or a window,
    in cells. Raises ConfigError for layers, heads and positions that are not there, and as `draw_unit` does.
    """
    layers, length = layer_of(kept, layer), len(kept.tokens)
    for name, window in (("rows", rows), ("keys", keys)):
        if window is not None and not 0 <= window.start < window.stop <= length:
            given = f"{name} {window.start}:{window.stop}"
            raise ConfigError(given, f"0 <= start < stop <= {length}", "name positions of the prompt")
    title = f"Request {kept.request}, plan {kept.plan}, layer {layer}"
    if head is None:
        if rows is not None or keys is not None:
            raise ConfigError("a window of all heads", "a window of one head", "name the head")
        return _draw_all(kept, layers, path, title)
    numbers = [_unit_of(each, head) for each in layers]
    units = [each.selection.units[number] for each, number in zip(layers, numbers)]
    title += f", {_name(units[0])}"
    told = _told(kept, layers, units)
    is_whole = rows is None and keys is None and kept.chunks == (range(length),)
    if is_whole and length <= LONGEST:
        return draw_unit(units[0], kept.tokens, path, title=title, told=told)
    rows, keys = rows or range(kept.chunks[0].start, kept.chunks[-1].stop), keys or range(length)
    scale = scale_of(max(len(rows), len(keys)))
    chunks = [Chunk(chunk, UnitParts(unit, kept.tokens)) for chunk, unit in zip(kept.chunks, units)]
    cells = pool_pairs(chunks, rows, keys, scale.pool)
    view = CellsView(units[-1], kept.tokens, cells, scale, rows, keys)
    words = f"{length} tokens, rows from {kept.chunks[0].start} computed; {_measured(kept, layers, units)}"
    caption = f"Rows {rows.start} to {rows.stop - 1} against keys {keys.start} to {keys.stop - 1}"
    patterns = pattern_lines(
        {line: panel for unit in units for panel in unit.panels for line in pattern_lines([panel])}.values()
    )
    return compose([view], [caption], patterns, told, (title, words), modality_legend(kept.tokens), _notes(cells)).save(
        path
    )


def _draw_all(kept: KeptRequest, layers: Sequence[Layer], path: str | Path, title: str) -> Path:
    length = len(kept.tokens)
    scale = scale_of(length, SMALL_SIDE, SMALL_SIDE)
    named, present, cells = [], set(), None
    for first in layers[0].selection.units:
        units = [each.selection.units[_unit_of(each, first.heads[0])] for each in layers]
        chunks = [Chunk(chunk, UnitParts(unit, kept.tokens)) for chunk, unit in zip(kept.chunks, units)]
        most = MOST_PAIRS // len(layers[0].selection.units)
        cells = pool_pairs(chunks, range(length), range(length), scale.pool, most)
        present |= {part for part in Part if cells.counts[part]}
        name = f"{_name(first)}: {_kinds(units)}"
        named.append((name, _measured(kept, layers, units), cell_pixels(cells.part, cells.share, scale.zoom)))
    return compose_small(named, present, (title, f"{length} tokens"), _notes(cells)).save(path)


def _unit_of(layer: Layer, head: int) -> int:
    for number, unit in enumerate(layer.selection.units):
        if head in unit.heads:
            return number
    heads = sorted(head for unit in layer.selection.units for head in unit.heads)
    raise ConfigError(f"head {head}", f"{heads[0]} to {heads[-1]}", "count from 0")


def _verdicts(layers: Sequence[Layer], units: Sequence[Unit]) -> list[tuple[int, Verdict]]:
    """(chunk, what was decided) of these units."""
    pairs = enumerate(zip(layers, units))
    return [(n, each) for n, (layer, unit) in pairs for each in layer.verdicts if each.heads == unit.heads]


def _measured(kept: KeptRequest, layers: Sequence[Layer], units: Sequence[Unit]) -> str:
    """Density over all chunks, and the lowest recall."""
    pairs = [chunk.stop * (chunk.stop + 1) - chunk.start * (chunk.start + 1) for chunk in kept.chunks]
    shares = [layer.densities[_unit_of(layer, unit.heads[0])] for layer, unit in zip(layers, units)]
    density = sum(share * each for share, each in zip(shares, pairs)) / sum(pairs)
    recall = min((each.recall for _, each in _verdicts(layers, units)), default=1.0)
    return f"density {density:.1%}, recall {recall:.4f}"


def _told(kept: KeptRequest, layers: Sequence[Layer], units: Sequence[Unit]) -> list[str]:
    """The verdicts; of many chunks those of the lowest recall."""
    found = _verdicts(layers, units)
    shown = sorted(sorted(found, key=lambda each: each[1].recall)[:MOST_LINES], key=lambda each: each[0])
    lines = [f"chunk {n}, {each}" if len(kept.chunks) > 1 else str(each) for n, each in shown]
    hidden = len(found) - len(shown)
    return [
        f"Of the request: {_measured(kept, layers, units)}",
        *lines,
        *[f"and {hidden} more, of higher recall"] * bool(hidden),
    ]


def _notes(cells: Cells) -> list[str]:
    if cells.pool == 1:
        return []
    some = f" Of each {cells.pool} rows {cells.looked_at} were looked at, drawn at random."
    return [f"A dot stands for {cells.pool} x {cells.pool} pairs. {PALER}" + some * (cells.looked_at < cells.pool)]


def _name(unit: Unit) -> str:
    heads = unit.heads
    return f"head {heads[0]}" if len(heads) == 1 else f"heads {', '.join(map(str, heads))}"


def _kinds(units: Sequence[Unit]) -> str:
    """Of the last chunk, each kind of pattern once, in order of the panels."""
    return "/".join(dict.fromkeys(type(panel.pattern).__struct_config__.tag for panel in units[-1].panels))
