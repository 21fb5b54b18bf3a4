"""What one request really did, on disk: its token map, and of every layer the sets and the verdicts. One .npz file.

    header       JSON as uint8: schema, request, plan, chunks; per chunk and layer units, panels, verdicts, densities
    tokens_*     the columns of the token map, in the smallest integers that hold them
    columns ..   the sets of all panels, one after another (selection_tables.py)

Whatever does not fit is a ConfigError that names the file.
"""

import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import nan
from pathlib import Path

import msgspec
import numpy as np
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import Pattern
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Panel, Phases, Selection, Unit, read_marks
from sglang_mm.patterns.select.report import Patterns, Trial, Verdict
from sglang_mm.patterns.selection_tables import TABLES, Arrays, Cutter, from_arrays, join, narrow, to_arrays
from sglang_mm.types import Axis, Modality, TokenMap
from sglang_mm.types.tokens import COLUMNS

SCHEMA = 1
LONGEST_NAME = 80
"""Characters of a request's id that its file's name keeps."""
LEVEL = 1
"""Of zlib: larger levels take several times as long, and save a tenth."""
AGAIN = "keep the request again, with this version of sglang_mm"


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """One layer of one chunk. densities: per unit, as in `Report`. selection: with the lists of all row blocks."""

    layer: int
    selection: Selection
    verdicts: tuple[Verdict, ...]
    densities: tuple[float, ...]


class _Panel(msgspec.Struct, frozen=True):
    rows: Modality | None
    keys: Modality | None
    pattern: Pattern
    sizes: dict[str, int]
    axis: Axis | None = None


class _Unit(msgspec.Struct, frozen=True):
    heads: tuple[int, ...]
    panels: tuple[_Panel, ...]


class _Trial(msgspec.Struct, frozen=True):
    patterns: Patterns
    recall: float | None
    """None: no number."""


class _Verdict(msgspec.Struct, frozen=True):
    heads: tuple[int, ...]
    rows: Modality | None
    kept: Patterns
    recall: float
    trials: tuple[_Trial, ...]
    reason: str


class _Layer(msgspec.Struct, frozen=True):
    layer: int
    units: tuple[_Unit, ...]
    verdicts: tuple[_Verdict, ...]
    densities: tuple[float, ...]


class _Header(msgspec.Struct, frozen=True):
    schema: int
    request: str
    plan: str
    group: int
    grids: tuple[tuple[int, int], ...]
    chunks: tuple[tuple[int, int], ...]
    layers: tuple[tuple[_Layer, ...], ...]


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A KeptLayer on the CPU, its sets as small arrays: to be held until a request's last layer is done, and as read
    from a file, where `origin` is its name. It has the attributes of a KeptLayer; `selection` raises ConfigError for
    sets that `tokens`, the prompt, does not have.
    """

    header: _Layer
    group: int
    arrays: Arrays
    tokens: TokenMap | None = None
    origin: str = ""

    @property
    def layer(self) -> int:
        return self.header.layer

    @property
    def densities(self) -> tuple[float, ...]:
        return self.header.densities

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(_from_header(each) for each in self.header.verdicts)

    @cached_property
    def selection(self) -> Selection:
        try:
            cutter = Cutter(self.arrays)
            units = tuple(
                Unit(unit.heads, tuple(_read_panel(panel, cutter) for panel in unit.panels))
                for unit in self.header.units
            )
            sets = [panel.chosen for unit in units for panel in unit.panels]
            if self.tokens is not None:
                _check_sets(sets, self.tokens)
        except ConfigError as error:
            raise ConfigError(f"{self.origin}: layer {self.layer}: {error.given}", error.allowed, AGAIN) from error
        return Selection(units, self.group)


@dataclass(frozen=True, eq=False)
class KeptRequest:
    """request: its id. group: query heads per K/V head. plan: what was asked, `auto` or a plan's name or digest.

    chunks: the rows that each prefill computed, ascending; what lies before the first was cached. layers: per chunk, in
    order of layers. Raises ConfigError for chunks without layers, and for layers of other groups.
    """

    request: str
    tokens: TokenMap
    chunks: tuple[range, ...]
    group: int
    plan: str
    layers: tuple[tuple[KeptLayer | PackedLayer, ...], ...]

    def __post_init__(self):
        if not self.chunks or len(self.layers) != len(self.chunks) or not all(self.layers):
            given = f"{len(self.chunks)} chunks with {[len(layers) for layers in self.layers]} layers"
            raise ConfigError(given, "one chunk or more, each with its layers", "name every chunk")
        ends = [(chunk.start, chunk.stop) for chunk in self.chunks]
        edges = [0, *(edge for pair in ends for edge in pair), len(self.tokens)]
        if edges != sorted(edges) or any(start == stop for start, stop in ends):
            raise ConfigError(f"chunks {ends}", f"ascending, below {len(self.tokens)}", "name the rows of each chunk")
        layers = [layer for of_chunk in self.layers for layer in of_chunk]
        groups = {(each.selection if isinstance(each, KeptLayer) else each).group for each in layers}
        if groups != {self.group}:
            raise ConfigError(f"groups of {sorted(groups)} heads", f"{self.group}", "pass the group of the selections")


def file_name(request: str) -> str:
    """A file's name for a request's id: its letters, digits, `.`, `_` and `-`; where that is less, a digest too."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", request)[:LONGEST_NAME].lstrip(".")
    if plain and plain == request:
        return f"{plain}.npz"
    return f"{plain}-{blake2b(request.encode(errors='replace'), digest_size=6).hexdigest()}.npz"


def pack(kept: KeptLayer) -> PackedLayer:
    """Copies all sets to the CPU. Raises ConfigError for lists that are not causal."""
    parts, units = [], []
    for unit in kept.selection.units:
        panels = []
        for panel in unit.panels:
            parts.append(to_arrays(panel.chosen))
            axis = panel.chosen.axis if isinstance(panel.chosen, Phases) else None
            sizes = {name: len(array) for name, array in parts[-1].items()}
            panels.append(_Panel(panel.rows, panel.keys, panel.pattern, sizes, axis))
        units.append(_Unit(unit.heads, tuple(panels)))
    verdicts = tuple(_to_header(each) for each in kept.verdicts)
    header = _Layer(kept.layer, tuple(units), verdicts, tuple(map(float, kept.densities)))
    return PackedLayer(header, kept.selection.group, join(parts))


def save(path: str | Path, kept: KeptRequest) -> Path:
    """Write the file, all of it or nothing, and return where. Raises ConfigError when the place cannot be written."""
    path = Path(path)
    layers = [[each if isinstance(each, PackedLayer) else pack(each) for each in of_chunk] for of_chunk in kept.layers]
    headers = tuple(tuple(layer.header for layer in of_chunk) for of_chunk in layers)
    chunks = tuple((chunk.start, chunk.stop) for chunk in kept.chunks)
    header = _Header(SCHEMA, kept.request, kept.plan, kept.group, kept.tokens.grids, chunks, headers)
    arrays = {"header": np.frombuffer(msgspec.json.encode(header), dtype=np.uint8)}
    arrays |= {f"tokens_{name}": narrow(getattr(kept.tokens, name).cpu().numpy()) for name in COLUMNS}
    arrays |= join(layer.arrays for of_chunk in layers for layer in of_chunk)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{path}: {error.strerror}", "a place for a file", "check path and room") from error
    return path


def load(path: str | Path) -> KeptRequest:
    """Read and check a file. Raises ConfigError, naming the file, for whatever does not fit."""
    try:
        arrays = _read(path)
        header = _read_header(arrays.pop("header", None))
        columns = {name: torch.from_numpy(arrays.pop(f"tokens_{name}").astype(np.int32)) for name in COLUMNS}
        tokens = TokenMap(**columns | {"modality": columns["modality"].to(torch.uint8)}, grids=header.grids)
        cutter = Cutter(arrays)
        layers = tuple(
            tuple(PackedLayer(each, header.group, cutter.take(_sizes(each)), tokens, str(path)) for each in of_chunk)
            for of_chunk in header.layers
        )
        cutter.check_empty()
        chunks = tuple(range(start, stop) for start, stop in header.chunks)
        return KeptRequest(header.request, tokens, chunks, header.group, header.plan, layers)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.given}", error.allowed, error.remedy) from error
    except KeyError as error:
        raise ConfigError(f"{path}: no {error.args[0]}", "a whole file of a request", AGAIN) from error


def _read(path: str | Path) -> Arrays:
    """Every array. The archive's checksums are compared before anything is made of the bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
        return {name: np.lib.format.read_array(io.BytesIO(each), allow_pickle=False) for name, each in members.items()}
    except OSError as error:
        raise ConfigError(error.strerror or str(error), "a readable file", "check the path") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise ConfigError(str(error), "a file written by --keep-selections", AGAIN) from error


def _read_header(array: np.ndarray | None) -> _Header:
    try:
        raw = msgspec.json.decode(b"" if array is None else array.tobytes())
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise ConfigError(f"schema: {schema!r}", f"{SCHEMA}", AGAIN)
        return msgspec.convert(raw, _Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"header: {error}", "the header of a kept request", AGAIN) from error


def _sizes(layer: _Layer) -> Counter[str]:
    """Numbers in each array of the layer. Raises ConfigError for arrays that are none of ours."""
    sizes = Counter()
    for unit in layer.units:
        for panel in unit.panels:
            sizes.update(panel.sizes)
    if not sizes.keys() <= set(TABLES):
        raise ConfigError(f"tables {sorted(sizes)}", ", ".join(TABLES), AGAIN)
    return sizes


def _read_panel(panel: _Panel, cutter: Cutter) -> Panel:
    chosen = from_arrays(panel.pattern, panel.axis, cutter.take(panel.sizes))
    return Panel(panel.rows, panel.keys, panel.pattern, chosen)


def _check_sets(sets: Sequence[Chosen], tokens: TokenMap) -> None:
    """Raises ConfigError for what the prompt does not have."""
    read_marks(sets, tokens)
    blocks = -(-len(tokens) // BLOCK)
    for each in sets:
        if isinstance(each, BlockSet) and len(each.row_blocks) and int(each.row_blocks[-1]) >= blocks:
            raise ConfigError(f"row block {int(each.row_blocks[-1])}", f"below {blocks}", AGAIN)


def _to_header(verdict: Verdict) -> _Verdict:
    trials = tuple(_Trial(each.patterns, each.recall) for each in verdict.trials)
    return _Verdict(verdict.heads, verdict.rows, verdict.kept, verdict.recall, trials, verdict.reason)


def _from_header(verdict: _Verdict) -> Verdict:
    trials = tuple(Trial(each.patterns, nan if each.recall is None else each.recall) for each in verdict.trials)
    return Verdict(verdict.heads, verdict.rows, verdict.kept, verdict.recall, trials, verdict.reason)
