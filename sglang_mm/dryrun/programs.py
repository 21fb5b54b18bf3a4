"""Tile programs of every kind of head, compiled at the prompt's length for every rank and every piece of keys."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_mm.patterns.boundary import Boundary2D, HeadPlan, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.density import density
from sglang_mm.patterns.pictures.illustration import illustrate
from sglang_mm.patterns.plan import Plan
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import Layout, TokenMap

MOST_KINDS = 24
"""Kinds of heads of one plan that are compiled: those that most heads have."""
CATALOGUE: dict[str, HeadPlan] = {
    "dense": NoBoundary(Dense()),
    "a_shape": NoBoundary(AShape()),
    "tri_shape": NoBoundary(TriShape()),
    "vertical_slash": NoBoundary(VerticalSlash()),
    "grid, frames": NoBoundary(Grid("frame")),
    "grid, rows": NoBoundary(Grid("row")),
    "grid, lines both ways": NoBoundary(Grid("frame", horizontal=True)),
    "grid, shifts": NoBoundary(Grid("frame", slash=1)),
    "blocks": NoBoundary(Blocks()),
    "k: a_shape": KBoundary(AShape()),
    "q: vertical_slash, grid": QBoundary(text=VerticalSlash(), image=Grid("row"), video=Grid("frame")),
    "2d: grid, vertical_slash": Boundary2D(
        {
            "video-video": Grid("frame"),
            "image-image": Grid("row"),
            "text-video": VerticalSlash(),
            "video-text": AShape(),
        }
    ),
}
"""Every pattern and boundary, with the numbers of the paper."""


@dataclass(frozen=True)
class RankTiles:
    """Of one head on one rank, over all pieces: tiles that a kernel multiplies without and with a mask. entries: of the
    programs' lists. bytes: of the largest piece's tables. seconds: to compile the rows, and all pieces."""

    full: int
    masked: int
    entries: int
    bytes: int
    seconds: float

    @property
    def tiles(self) -> int:
        return self.full + self.masked


@dataclass(frozen=True)
class Kind:
    """heads: how many have it in the plan, 0 for the catalogue. density: pairs it computes, of the causal ones."""

    name: str
    heads: int
    density: float
    ranks: tuple[RankTiles, ...]

    @property
    def balance(self) -> float:
        """Tiles of the slowest rank over the mean."""
        tiles = [rank.tiles for rank in self.ranks]
        return max(tiles) * len(tiles) / sum(tiles)


def compile_kinds(
    wanted: Sequence[tuple[str, int, HeadPlan]], tokens: TokenMap, layout: Layout, group: int
) -> Iterator[Kind]:
    """One head of each kind; sets that a request would find online are evenly spaced. group: heads per K/V head."""
    shards = [Shard(tokens, rows) for rows in layout.rows]
    for name, heads, head_plan in wanted:
        unit = illustrate(head_plan, tokens)
        selection = Selection((unit,), group)
        ranks = tuple(_compile(selection, shard, shards) for shard in shards)
        yield Kind(name, heads, density(unit, tokens), ranks)


def of_catalogue() -> list[tuple[str, int, HeadPlan]]:
    """(name, 0, head plan) of every kind."""
    return [(name, 0, head_plan) for name, head_plan in CATALOGUE.items()]


def of_plan(plan: Plan) -> list[tuple[str, int, HeadPlan]]:
    """(name, heads, head plan) of the MOST_KINDS kinds that most heads of the plan have."""
    heads: Counter[str] = Counter()
    plans: dict[str, HeadPlan] = {}
    for layer in range(plan.model.layers):
        for own, head_plan in plan.units(layer):
            heads[repr(head_plan)] += len(own)
            plans[repr(head_plan)] = head_plan
    return [(_name(plans[key]), count, plans[key]) for key, count in heads.most_common(MOST_KINDS)]


def _compile(selection: Selection, rows: Shard, pieces: Sequence[Shard]) -> RankTiles:
    began = time.perf_counter()
    compiled = compile_rows(selection, rows)
    full = masked = entries = largest = 0
    for piece in pieces:
        programs = compile_piece(compiled, piece)
        full += sum(int(program.full_count.sum()) for program in programs)
        masked += sum(int(program.part_count.sum()) for program in programs)
        entries += sum(program.entries for program in programs)
        largest = max(largest, sum(program.nbytes() for program in programs))
    return RankTiles(full, masked, entries, largest, time.perf_counter() - began)


def _name(head_plan: HeadPlan) -> str:
    boundary = head_plan.__struct_config__.tag
    match head_plan:
        case QBoundary():
            parts = [head_plan.text, head_plan.image, head_plan.video]
        case Boundary2D():
            parts = list(head_plan.pairs.values())
        case _:
            parts = [head_plan.pattern]
    kinds = ", ".join(dict.fromkeys(part.__struct_config__.tag for part in parts))
    return kinds if boundary == "none" else f"{boundary}: {kinds}"
