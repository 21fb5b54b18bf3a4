"""Random layers: prompts, selections with sets drawn directly, heads and groups, ownership by ranks, tile sizes.

For files named *_properties.py. Large sets come from a drawn seed: drawing them number by number takes seconds.
"""

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.boundary import PAIRS, Boundary2D, NoBoundary, panels
from sglang_mm.patterns.catalog import Blocks, Grid, Pattern, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Nothing, Panel, Phases, Selection, Unit
from sglang_mm.types import Axis, Run, TokenMap
from tests import token_maps
from tests.exactness.layers import Layer
from tests.patterns.strategies import head_plans

FIXED = (
    token_maps.tiny_mixed(),
    token_maps.uniform_video(40, 3, 5, newline=True),
    token_maps.timestamped_video(14, 4, 6),
    token_maps.two_videos(True),
    token_maps.two_videos(False),
    token_maps.interleaved(),
    token_maps.text_only(300),
)
prompts = st.sampled_from(FIXED) | token_maps.token_maps(400)
seeds = st.integers(0, 2**20)
tiles = st.integers(24, BLOCK) | st.sampled_from([64, 128]) | st.integers(5, 24)


def some(draw, count: int, most: int) -> Tensor:
    """int64, ascending: at most `most` of the numbers below `count`; drawn as a size and a seed."""
    size = draw(st.integers(0, min(count, most)))
    shuffle = torch.Generator().manual_seed(draw(seeds))
    return torch.randperm(count, generator=shuffle)[:size].sort().values


@st.composite
def choices(draw, pattern: Pattern, tokens: TokenMap) -> Chosen:
    blocks = -(-len(tokens) // BLOCK)
    match pattern:
        case VerticalSlash():
            return Lines(some(draw, len(tokens), 200), some(draw, blocks, blocks))
        case Grid():
            axis = draw(st.sampled_from(Axis))
            classes = tokens.classes(axis)
            sizes = enumerate(torch.tensor(classes.starts).diff().tolist())
            shifts = [[space, shift] for space, size in sizes for shift in some(draw, size, pattern.slash).tolist()]
            return Phases(axis, some(draw, len(classes), 4), torch.tensor(shifts, dtype=torch.int64).view(-1, 2))
        case Blocks():
            lists = [torch.cat([some(draw, row, row), torch.tensor([0, row])]).unique() for row in range(blocks)]
            return BlockSet(torch.arange(blocks), torch.tensor([0, *map(len, lists)]).cumsum(0), torch.cat(lists))
        case _:
            return Nothing()


@st.composite
def units(draw, tokens: TokenMap, heads: tuple[int, ...] = (0,), plans=head_plans) -> Unit:
    """A unit with any boundary and, for each of its panels, a legal pattern."""
    wanted = panels(draw(plans), tokens.modalities)
    return Unit(heads, tuple(Panel(rows, keys, each, draw(choices(each, tokens))) for rows, keys, each in wanted))


@st.composite
def selections(draw, tokens: TokenMap, plans=head_plans) -> Selection:
    """1, 4, 7 or 8 query heads per K/V head, one or two of these. A group is one unit, or several, each of its own."""
    group = draw(st.sampled_from([1, 4, 7, 8]))
    found = []
    for first in range(0, group * draw(st.integers(1, 2)), group):
        cuts = draw(st.sets(st.integers(1, group - 1), max_size=2)) if group > 1 else ()
        for start, stop in pairwise([0, *sorted(cuts), group]):
            found.append(draw(units(tokens, tuple(range(first + start, first + stop)), plans)))
    return Selection(tuple(found), group)


def runs(tokens: TokenMap) -> list[Run]:
    lengths = tokens.span.unique_consecutive(return_counts=True)[1].tolist()
    return [Run(start, length) for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths)]


@st.composite
def ownership(draw, tokens: TokenMap, most: int = 8) -> tuple[Tensor, ...]:
    """Per rank, 1 to `most`, ascending positions; each token once. A real layout, zigzag pieces cut anywhere, or
    anything at all."""
    count, prompt = draw(st.integers(1, most)), len(tokens)
    kind = draw(st.sampled_from(["layout", "zigzag", "anything", "some ranks have none"]))
    if kind == "layout":
        return make_layout(runs(tokens), count).rows
    if kind == "zigzag":
        cuts = some(draw, prompt, 2 * count - 1).tolist()
        lengths = torch.tensor([0, *cuts, prompt]).diff()
        piece = torch.arange(len(lengths))
        owner = torch.minimum(piece, 2 * count - 1 - piece).repeat_interleave(lengths)
    else:
        holders = torch.arange(count) if kind == "anything" else torch.arange(0, count, 2)
        shuffle = torch.Generator().manual_seed(draw(seeds))
        owner = holders[torch.randint(0, len(holders), (prompt,), generator=shuffle)]
    return tuple((owner == rank).nonzero().flatten() for rank in range(count))


@st.composite
def layers(draw, plans=head_plans) -> Layer:
    tokens = draw(prompts)
    rows = draw(ownership(tokens))
    sparse_rows = draw(st.sampled_from([False, False, False, True]))
    return Layer(tokens, draw(selections(tokens, plans)), rows, rows, draw(tiles), draw(tiles), sparse_rows)


columns_and_diagonals = st.builds(VerticalSlash, sink=st.sampled_from([0, 1, 40]), window=st.sampled_from([1, 3, 130]))
crossings = st.builds(NoBoundary, columns_and_diagonals) | st.builds(
    Boundary2D, st.fixed_dictionaries(dict.fromkeys(PAIRS, columns_and_diagonals))
)
"""Plans in which columns cross block diagonals, for all keys or for those of each modality."""
