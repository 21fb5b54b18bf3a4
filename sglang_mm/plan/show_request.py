"""What a request really did, as text: a letter per head of what was kept, and why; each verdict of a layer in full."""

from collections import Counter
from collections.abc import Sequence

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Dense
from sglang_mm.patterns.select.report import Verdict
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, PackedLayer
from sglang_mm.plan.show import LETTERS, SHARED

Layer = KeptLayer | PackedLayer
PAIRS = "2"
"""Rows with different patterns for different keys."""


def request_table(kept: KeptRequest, chunk: int | None = None) -> str:
    """A line per layer, a cell per head; of a prompt in several chunks a line per chunk, unless one is named.

    A cell has a letter per modality of rows that was decided, or one where they are alike.
    """
    if chunk is None and len(kept.chunks) > 1:
        lines = [f"chunk {n:<4} {_rows(each)}: {_summary(kept.layers[n])}" for n, each in enumerate(kept.chunks)]
        return "\n".join([request_title(kept), "", *lines, "", "--chunk N has the heads of one"])
    number = 0 if chunk is None else chunk
    layers = kept.layers[number]
    cells = {layer.layer: _cells(layer.verdicts) for layer in layers}
    heads = sorted({head for of_layer in cells.values() for head in of_layer})
    width = max(
        len(cell) for cell in [f"{heads[-1]}" if heads else "", *(c for each in cells.values() for c in each.values())]
    )
    heading = " ".join(["layer", *(f"{head:<{width}}" for head in heads), " recall density"])
    lines = [request_title(kept), f"{_rows(kept.chunks[number])}: {_summary(layers)}", "", heading]
    for layer in layers:
        letters = [cells[layer.layer].get(head, "").ljust(width) for head in heads]
        lines.append(" ".join([f"{layer.layer:5}", *letters, f" {_lowest(layer):.4f} {_density(layer):7.1%}"]))
    lines += ["", *_legend([each for layer in layers for each in layer.verdicts])]
    return "\n".join(line.rstrip() for line in lines)


def request_details(kept: KeptRequest, layer: int, chunk: int | None = None) -> str:
    """Every verdict of one layer in full. Raises ConfigError where the file has no such layer."""
    lines = [request_title(kept)]
    for number, layers in enumerate(kept.layers):
        found = [each for each in layers if each.layer == layer]
        if not found:
            allowed = ", ".join(str(each.layer) for each in layers)
            raise ConfigError(f"--layer {layer}", allowed, "name a layer that was kept")
        if chunk is None or chunk == number:
            lines += ["", f"layer {layer}, {_rows(kept.chunks[number])}: {_summary(found)}"]
            densities = dict(zip((unit.heads for unit in found[0].selection.units), found[0].densities))
            lines += [
                f"  {verdict}; density of the head {densities[verdict.heads]:.1%}" for verdict in found[0].verdicts
            ]
    return "\n".join(lines)


def request_title(kept: KeptRequest) -> str:
    modalities = ", ".join(
        f"{each.name.lower()} {int((kept.tokens.modality == each).sum())}" for each in kept.tokens.modalities
    )
    chunks = f"{len(kept.chunks)} chunk" + "s" * (len(kept.chunks) > 1)
    return f"request {kept.request}: {len(kept.tokens)} tokens ({modalities}) in {chunks}, plan {kept.plan}"


def _cells(verdicts: Sequence[Verdict]) -> dict[int, str]:
    """By head."""
    found: dict[tuple[int, ...], str] = {}
    for verdict in verdicts:
        found[verdict.heads] = found.get(verdict.heads, "") + _letter(verdict)
    cells = {}
    for heads, letters in found.items():
        cells |= dict.fromkeys(heads, SHARED[0]) | {heads[0]: letters if len(set(letters)) > 1 else letters[:1]}
    return cells


def _letter(verdict: Verdict) -> str:
    kinds = {type(pattern).__struct_config__.tag for _, pattern in verdict.kept}
    return LETTERS[kinds.pop()] if len(kinds) == 1 else PAIRS


def _legend(verdicts: Sequence[Verdict]) -> list[str]:
    """What the letters mean and how often they were kept; why rows are not what was asked for."""
    names = {letter: name for name, letter in LETTERS.items()} | {PAIRS: "one per modality of the keys"}
    counts = Counter(map(_letter, verdicts))
    lines = ["      verdicts", *(f"{letter} {count:12} {names[letter]}" for letter, count in counts.most_common())]
    several = len({verdict.rows for verdict in verdicts}) > 1
    lines += ["a letter per modality of the rows (text, image, video), or one where they are alike"] * several
    lines += [f"{SHARED[0]} {SHARED[1]}"] * any(len(verdict.heads) > 1 for verdict in verdicts)
    fallbacks = Counter(verdict.reason for verdict in verdicts if verdict.reason)
    return lines + [""] * bool(fallbacks) + [f"{count:6} x {reason}" for reason, count in fallbacks.most_common()]


def _summary(layers: Sequence[Layer]) -> str:
    verdicts = [each for layer in layers for each in layer.verdicts]
    sparse = sum(not all(isinstance(pattern, Dense) for _, pattern in each.kept) for each in verdicts)
    density = sum(map(_density, layers)) / len(layers)
    lowest, fallbacks = min(map(_lowest, layers)), sum(bool(each.reason) for each in verdicts)
    counts = f"{sparse} of {len(verdicts)} verdicts sparse, {fallbacks} with a reason"
    return f"{counts}, lowest recall {lowest:.4f}, density {density:.1%}"


def _lowest(layer: Layer) -> float:
    return min((each.recall for each in layer.verdicts), default=1.0)


def _density(layer: Layer) -> float:
    """Mean over the units."""
    return sum(layer.densities) / max(1, len(layer.densities))


def _rows(chunk: range) -> str:
    return f"rows {chunk.start} to {chunk.stop - 1}"
