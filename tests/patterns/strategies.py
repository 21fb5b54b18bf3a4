"""Random prompts, patterns and selections, small enough for a mask. For files named *_properties.py."""

import torch
from hypothesis import strategies as st

from sglang_mm.patterns.boundary import PAIRS, Boundary2D, HeadPlan, KBoundary, NoBoundary, QBoundary, panels
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.types import Axis, Modality, TokenMap
from tests.patterns.maps import Media, Text, token_map

edges = [1, 2, 126, 127, 128, 129, 130, 255, 256, 257, 10**6]  # around borders of blocks, and beyond every prompt
windows = st.integers(1, 300) | st.sampled_from(edges)
small = st.just(0) | windows
media = st.builds(
    Media, st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), before=st.integers(0, 3), newline=st.booleans()
)
texts = st.builds(Text, st.integers(1, 150) | st.just(300))
maps = st.lists(texts | media, min_size=1, max_size=5).map(lambda parts: token_map(*parts))

dense = st.just(Dense())
a_shapes = st.builds(AShape, sink=small, window=windows)
tri_shapes = st.builds(TriShape, sink=small, window=windows, last=small)
vertical_slashes = st.builds(VerticalSlash, sink=small, window=windows)
lines = st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)).filter(any)
grids = st.builds(
    lambda on, sink, window, tail: Grid(
        vertical=on[0], horizontal=on[1], slash=on[2], sink=sink, window=window, tail=tail
    ),
    lines,
    st.integers(0, 40),
    st.integers(1, 40),
    st.booleans(),
)
patterns = dense | a_shapes | tri_shapes | vertical_slashes | grids | st.just(Blocks())
vertical_grids = st.builds(Grid, tail=st.just(False), sink=st.integers(0, 40), window=st.integers(1, 40))
to_text = dense | a_shapes | vertical_slashes | st.just(Blocks())


def legal(rows: Modality, keys: Modality) -> st.SearchStrategy[Pattern]:
    if keys == Modality.TEXT:
        return to_text
    return patterns if rows == keys else to_text | vertical_grids


head_plans: st.SearchStrategy[HeadPlan] = (
    st.builds(NoBoundary, patterns)
    | st.builds(KBoundary, patterns)
    | st.builds(QBoundary, patterns, patterns, patterns)
    | st.fixed_dictionaries({}, optional={name: legal(*pair) for name, pair in PAIRS.items()}).map(Boundary2D)
)


def _some(draw, count: int, most: int) -> torch.Tensor:
    """int64, ascending: at most `most` of the numbers below `count`."""
    numbers = st.sets(st.integers(0, count - 1), max_size=most) if count else st.just(set())
    return torch.tensor(sorted(draw(numbers)), dtype=torch.int64)


@st.composite
def choices(draw, pattern: Pattern, tokens: TokenMap) -> Chosen:
    """What the online selection could have found."""
    blocks = -(-len(tokens) // BLOCK)
    match pattern:
        case VerticalSlash():
            return Lines(_some(draw, len(tokens), 20), _some(draw, blocks, 3))
        case Grid():
            axis = draw(st.sampled_from(Axis))
            classes = tokens.classes(axis)
            sizes = enumerate(torch.tensor(classes.starts).diff().tolist())
            shifts = [[space, shift] for space, size in sizes for shift in _some(draw, size, pattern.slash).tolist()]
            return Phases(axis, _some(draw, len(classes), 4), torch.tensor(shifts, dtype=torch.int64).view(-1, 2))
        case Blocks():
            rows = _some(draw, blocks, blocks)
            lists = [torch.cat([_some(draw, row, 3), torch.tensor([0, row])]).unique() for row in rows.tolist()]
            ptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
            return BlockSet(rows, ptr, torch.cat([*lists, torch.empty(0, dtype=torch.int64)]))
        case _:
            return Nothing()


@st.composite
def units(draw, tokens: TokenMap, head_plans: st.SearchStrategy[HeadPlan] = head_plans) -> Unit:
    wanted = panels(draw(head_plans), tokens.modalities)
    found = [Panel(rows, keys, pattern, draw(choices(pattern, tokens))) for rows, keys, pattern in wanted]
    return Unit((0,), tuple(found))
