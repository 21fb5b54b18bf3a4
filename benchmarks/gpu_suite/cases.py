"""What is checked: every pattern, both boundaries, all head shapes and dtypes, whole prompts and the pieces of ranks.

Selections are drawn, the programs are compiled from them as everywhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.gpu_suite.prompts import Prompt, image, prompt, text, video
from benchmarks.gpu_suite.selections import some, whole
from benchmarks.gpu_suite.sizes import Sizes
from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Lines, Nothing, Panel, Phases, Selection, Unit
from sglang_mm.types import Axis, Modality

Panels = tuple[Panel, ...]
Ranks = list[tuple[Tensor, list[Tensor]]]
NEAR = AShape(sink=16, window=100)


@dataclass(frozen=True, eq=False)
class Case:
    """ranks: positions of each rank's rows, and of the pieces that come by, int64 ascending."""

    name: str
    prompt: Prompt
    selection: Selection
    ranks: Ranks
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {dtype}"


def mixed_prompt(frames: int, device: torch.device) -> Prompt:
    """Texts, two videos of different frames, one with newlines, and an image. Its length is no multiple of 128."""
    media = video(frames, 5, 7, newline=True), text(70), image(6, 4), text(1), video(4, 3, 5)
    return prompt([text(17), *media, text(31)], device)


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    mixed = mixed_prompt(sizes.check_frames, device)
    everything = torch.arange(len(mixed), device=device)
    alone: Ranks = [(everything, [everything])]
    seed = 0

    def case(name, ranks, kinds, heads, kv_heads, head_dim, dtype, of=mixed) -> Case:
        nonlocal seed
        seed += 1
        return Case(
            name, of, _selection(of, kinds, heads, kv_heads, seed), ranks, heads, kv_heads, head_dim, dtype, seed
        )

    for dtype in sizes.check_dtypes:
        is_main = sizes.check_all or dtype == sizes.dtype
        for head_dim in sizes.check_dims if is_main else ():
            yield case("all patterns", alone, [*KINDS], len(KINDS), 1, head_dim, dtype)
        head_dim = sizes.check_dims[-1]
        for group in sizes.check_groups if is_main else ():
            yield case("all patterns", alone, [*KINDS], 2 * group, 2, head_dim, dtype)
        for kind in KINDS:
            yield case(kind, alone, [kind], 4, 2, head_dim, dtype)
        ranks = _ring(mixed, 3, device)
        yield case("3 ranks", ranks, [*KINDS], len(KINDS), 1, head_dim, dtype)
        lone = [(ranks[0][0], [ranks[2][0]])]
        yield case("rows without keys", lone, [*KINDS], len(KINDS), 1, head_dim, dtype)
        for tokens in (1, 130):
            short = prompt([text(tokens)], device)
            at = torch.arange(tokens, device=device)
            kinds = ["dense", "a_shape", "vertical_slash"]
            yield case(f"{tokens} tokens of text", [(at, [at])], kinds, 4, 2, head_dim, dtype, of=short)


def _ring(of: Prompt, width: int, device: torch.device) -> Ranks:
    """Every rank's rows, and all pieces in the order in which they come by."""
    rows = [each.to(device) for each in make_layout(of.runs, width).rows]
    return [(rows[rank], [rows[(rank - hop) % width] for hop in range(width)]) for rank in range(width)]


def _selection(of: Prompt, kinds: list[str], heads: int, kv_heads: int, seed: int) -> Selection:
    """Head h has kind h modulo their number; with one kind, the first two heads of a group share a unit."""
    draw = torch.Generator().manual_seed(seed)
    group = heads // kv_heads
    sets: list[tuple[int, ...]] = [(head,) for head in range(heads)]
    if len(kinds) == 1 and group > 1:
        sets = [(0, 1), *sets[2:]]
    units = [Unit(each, KINDS[kinds[n % len(kinds)]](of, draw)) for n, each in enumerate(sets)]
    return Selection(tuple(units), group)


def _vertical_slash(of: Prompt, draw) -> Panels:
    blocks = -(-len(of) // BLOCK)
    lines = Lines(some(20, len(of), draw, of), some(2, blocks, draw, of))
    return (whole(VerticalSlash(vertical=20, slash=256, sink=8, window=40), lines),)


def _phases(of: Prompt, draw, axis: Axis, classes: int, shifts: int = 0) -> Phases:
    """Shifts of each name space: the first ones but 0, which every row has in its window."""
    found = of.tokens.classes(axis)
    sizes = [stop - start for start, stop in zip(found.starts, found.starts[1:])]
    pairs = [(space, shift) for space, size in enumerate(sizes) for shift in range(1, min(1 + shifts, size))]
    lines = some(classes, len(found), draw, of)
    return Phases(axis, lines, lines.new_tensor(pairs).view(-1, 2))


def _grid(of: Prompt, draw, axis: Axis, shifts: int = 0) -> Panels:
    pattern = Grid(axis=str(axis), horizontal=not shifts, slash=shifts, phases=2, sink=8, window=50)
    return (whole(pattern, _phases(of, draw, axis, 2, shifts)),)


def _blocks(of: Prompt, draw) -> Panels:
    """The row's own block, the first, and some between."""
    blocks = -(-len(of) // BLOCK)
    rows = [sorted({0, row, *some(2, row + 1, draw, of).tolist()}) for row in range(blocks)]
    tables = [range(blocks), accumulate(map(len, rows), initial=0), (key for row in rows for key in row)]
    device = of.tokens.modality.device
    chosen = BlockSet(*(torch.tensor([*table], dtype=torch.int64, device=device) for table in tables))
    return (whole(Blocks(), chosen),)


def _boundary_q(of: Prompt, draw) -> Panels:
    [lines] = _grid(of, draw, Axis.FRAME)
    return (
        Panel(Modality.TEXT, None, Dense(), Nothing()),
        Panel(Modality.IMAGE, None, NEAR, Nothing()),
        Panel(Modality.VIDEO, None, lines.pattern, lines.chosen),
    )


def _boundary_2d(of: Prompt, draw) -> Panels:
    """Grids on one kind of media, vertical lines alone from text, columns on text; what is left is dense or near."""
    named = {
        (Modality.VIDEO, Modality.VIDEO): _grid(of, draw, Axis.FRAME, shifts=2)[0],
        (Modality.TEXT, Modality.VIDEO): whole(
            Grid(axis="row", phases=1, sink=8, window=50, tail=False), _phases(of, draw, Axis.ROW, 1)
        ),
        (Modality.VIDEO, Modality.TEXT): _vertical_slash(of, draw)[0],
        (Modality.TEXT, Modality.TEXT): whole(NEAR),
    }
    pairs = [(rows, keys) for rows in Modality for keys in Modality]
    panels = [(rows, keys, named.get((rows, keys), whole(Dense()))) for rows, keys in pairs]
    return tuple(Panel(rows, keys, panel.pattern, panel.chosen) for rows, keys, panel in panels)


KINDS: dict[str, Callable[[Prompt, torch.Generator], Panels]] = {
    "dense": lambda of, draw: (whole(Dense()),),
    "a_shape": lambda of, draw: (whole(NEAR),),
    "tri_shape": lambda of, draw: (whole(TriShape(sink=16, window=100, last=20)),),
    "vertical_slash": _vertical_slash,
    "grid, frame axis": lambda of, draw: _grid(of, draw, Axis.FRAME),
    "grid, row axis": lambda of, draw: _grid(of, draw, Axis.ROW),
    "grid with shifts, frame axis": lambda of, draw: _grid(of, draw, Axis.FRAME, shifts=2),
    "grid with shifts, row axis": lambda of, draw: _grid(of, draw, Axis.ROW, shifts=1),
    "blocks": _blocks,
    "boundary q": _boundary_q,
    "boundary 2d": _boundary_2d,
}
