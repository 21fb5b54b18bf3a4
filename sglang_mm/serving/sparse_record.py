"""What sparse attention did in one prefill batch: counted while it runs, gathered over all ranks for the records.

Pairs, recalls and reasons are alike on all ranks of a ring, since they hold one selection; counting pairs is dealt out
by layers. Tiles are each rank's own. The T ranks of a replica have other heads: theirs come on top.
"""

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from sglang_mm.parallel.transport import Transport
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.density import causal_pairs
from sglang_mm.patterns.select import Report
from sglang_mm.patterns.select.auto import RULES
from sglang_mm.types import TileProgram, TokenMap

SAFE = 1.0  # recall where nothing is left out


class LayerTold(msgspec.Struct):
    """Of one layer on one rank. attended: pairs of all its heads, 0 on ranks that leave the counting to another.

    causal: pairs that dense attention of these heads computes. recall: the lowest of any rows that are sparse. tiles:
    pairs of a row tile and a key tile, each of up to 128 x 128, that this rank's kernels met, for all units. index_s,
    compile_s: seconds of the host, on a GPU without what it only launched, waits for other ranks included.
    """

    attended: int = 0
    causal: int = 0
    recall: float = SAFE
    tiles: int = 0
    index_s: float = 0.0
    compile_s: float = 0.0


OVER_RING = {"attended": max, "causal": max, "recall": min, "tiles": sum, "index_s": max, "compile_s": max}
OVER_HEADS = {**OVER_RING, "attended": sum, "causal": sum}
OVER_CHUNKS = {**OVER_HEADS, "index_s": sum, "compile_s": sum}
"""How the numbers of a layer add up over ranks of a ring, over ranks with other heads, and over chunks of a prompt."""


class Told(msgspec.Struct):
    """Of one request on one rank. fallbacks: by reason, how many choices, each for rows of one modality of a head.

    tiles_per_rank: of the ranks of a ring, when they are joined.
    """

    layers: list[LayerTold] = []
    fallbacks: dict[str, int] = {}
    kernels: list[str] = []
    passed_over: list[str] = []
    tiles_per_rank: list[int] = []


@dataclass(eq=False)
class _Counts:
    layers: dict[int, LayerTold] = field(default_factory=dict)
    tiles: dict[int, list[Tensor]] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)


class SparseLog:
    """Of one rank and batch. heads: its query heads."""

    def __init__(self, transport: Transport, heads: int):
        self.kernels: set[str] = set()
        self._transport, self._heads = transport, heads
        self._passed_over: set[str] = set()
        self._requests: dict[int, _Counts] = {}

    def selected(self, request: int, layer: int, selection: Selection, report: Report, tokens: TokenMap, chunk: range):
        """Called once per request and layer, in order of layers."""
        counts, ring = self._requests.setdefault(request, _Counts()), self._transport
        told = counts.layers[layer] = LayerTold(causal=causal_pairs(tokens, within=chunk) * self._heads)
        told.recall = min((verdict.recall for verdict in report.verdicts if verdict.is_sparse), default=SAFE)
        counts.fallbacks.update(report.fallbacks)
        for rule in RULES:
            counts.fallbacks.pop(rule, None)
        if layer % ring.size == ring.rank:
            sizes = [len(unit.heads) for unit in selection.units]
            shares = sum(size * share for size, share in zip(sizes, report.densities))
            rest = self._heads - sum(sizes)  # heads that the plan does not name: padding
            told.attended = round((shares + rest) * told.causal / self._heads)

    def took(self, request: int, layer: int, *, index_s: float = 0.0, compile_s: float = 0.0) -> None:
        """Host time of a layer, after it was selected for."""
        told = self._requests[request].layers[layer]
        told.index_s += index_s
        told.compile_s += compile_s

    def ran(self, request: int, layer: int, program: TileProgram) -> None:
        """Counted on the device: nothing waits for it before `told`."""
        visits = program.full_count.sum() + program.part_count.sum()
        self._requests[request].tiles.setdefault(layer, []).append(visits)

    def passed_over(self, why: str) -> None:
        """A backend that was asked for could not run a program."""
        self._passed_over.add(why)

    def told(self, request: int) -> Told:
        counts = self._requests.get(request, _Counts())
        for layer, visits in counts.tiles.items():
            counts.layers[layer].tiles = int(torch.stack(visits).sum())
        layers = [counts.layers[layer] for layer in sorted(counts.layers)]
        return Told(layers, dict(counts.fallbacks), sorted(self.kernels), sorted(self._passed_over))


def gather_told(mine: list[Told], circle: Transport | None) -> list[list[Told]]:
    """Per rank of the circle what it told of each request. Collective; JSON of a few hundred bytes a layer."""
    if circle is None or circle.size == 1:
        return [mine]
    data = torch.frombuffer(bytearray(msgspec.json.encode(mine)), dtype=torch.uint8).to(circle.device)
    size = torch.tensor([len(data)], device=circle.device)
    ranks = circle.size
    sizes = circle.all_to_all([size] * ranks, [1] * ranks, "record of sparse attention", True, "measurements")
    rows = [int(each) for each in sizes]
    parts = circle.all_to_all([data] * ranks, rows, "record of sparse attention", True, "measurements")
    return [msgspec.json.decode(part.cpu().numpy().tobytes(), type=list[Told]) for part in parts]


def join_ring(told: list[Told]) -> Told:
    """Of one request, over the ranks of a ring, which hold one selection: pairs as one of them counted, all tiles."""
    tiles = [sum(layer.tiles for layer in rank.layers) for rank in told]
    return Told(_layers(told, OVER_RING), told[0].fallbacks, *_names(told), tiles)


def join_replica(told: list[Told]) -> Told:
    """Over the T ranks of a replica, each with other heads."""
    fallbacks = sum((Counter(rank.fallbacks) for rank in told), Counter())
    tiles = [sum(each) for each in zip(*(rank.tiles_per_rank for rank in told), strict=True)]
    return Told(_layers(told, OVER_HEADS), dict(fallbacks), *_names(told), tiles)


def _layers(told: list[Told], rules: dict) -> list[LayerTold]:
    return [
        LayerTold(**{name: rule([getattr(one, name) for one in each]) for name, rule in rules.items()})
        for each in zip(*(rank.layers for rank in told), strict=True)
    ]


def _names(told: list[Told]) -> tuple[list[str], list[str]]:
    return tuple(
        sorted({name for each in told for name in getattr(each, field)}) for field in ("kernels", "passed_over")
    )


def record_of(plan: str, backend: str, told: Told) -> dict:
    """The `sparse` part of a request's record; see docs/observability.md. backend: what --kernel-backend says."""
    return summed(
        {
            "plan": plan,
            "kernel_backend": backend,
            "kernels": told.kernels,
            "tiles_per_rank": told.tiles_per_rank,
            "layers": [_rounded(msgspec.structs.asdict(layer)) for layer in told.layers],
            "fallbacks": told.fallbacks,
            "kernels_passed_over": told.passed_over,
        }
    )


def _rounded(numbers: dict) -> dict:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in numbers.items()}


def summed(sparse: dict) -> dict:
    """With density and recall of all layers in front."""
    layers = sparse["layers"]
    attended, causal = (sum(layer[name] for layer in layers) for name in ("attended", "causal"))
    recall = min((layer["recall"] for layer in layers), default=SAFE)
    return {**sparse, "density": attended / causal if causal else 1.0, "recall": recall,
            "pairs": {"attended": attended, "causal": causal}}  # fmt: skip


def join_chunks(earlier: dict, later: dict) -> dict:
    """The `sparse` parts of two chunks of a prompt, or of one that was sparse in part."""
    if "layers" not in earlier or "layers" not in later:
        return later if "layers" in later else earlier
    layers = [
        {name: rule([a[name], b[name]]) for name, rule in OVER_CHUNKS.items()}
        for a, b in zip(earlier["layers"], later["layers"], strict=True)
    ]
    lists = {name: sorted({*earlier[name], *later[name]}) for name in ("kernels", "kernels_passed_over")}
    tiles = [a + b for a, b in zip(earlier["tiles_per_rank"], later["tiles_per_rank"])]
    fallbacks = Counter(earlier["fallbacks"]) + Counter(later["fallbacks"])
    return summed({**later, **lists, "layers": layers, "tiles_per_rank": tiles, "fallbacks": dict(fallbacks)})
