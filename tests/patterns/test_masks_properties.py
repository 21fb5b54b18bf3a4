"""Masks against the specification read out token by token, and what every head plan guarantees."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.catalog import Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import Chosen
from sglang_mm.patterns.masks import mask, unit_mask
from sglang_mm.types import Place, TokenMap
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.strategies import choices, head_plans, maps, patterns, units

few = st.lists(
    st.builds(Text, st.integers(1, 12))
    | st.builds(Media, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), before=st.integers(0, 2)),
    min_size=1,
    max_size=3,
).map(lambda parts: token_map(*parts))
far_apart = st.just(token_map(Text(200), Media(3, 2, 5, newline=True), Text(70)))


def sees(i: int, j: int, pattern: Pattern, tokens: TokenMap, chosen: Chosen) -> bool:
    if j > i:
        return False
    if isinstance(pattern, Dense):
        return True
    if isinstance(pattern, Blocks):
        lists = zip(chosen.row_blocks.tolist(), chosen.ptr.tolist(), chosen.ptr.tolist()[1:])
        return any(i // 128 == row and j // 128 in chosen.key_blocks[first:stop].tolist() for row, first, stop in lists)
    if j < pattern.sink or i - j < pattern.window:
        return True
    if isinstance(pattern, TriShape):
        return i >= len(tokens) - pattern.last
    if isinstance(pattern, VerticalSlash):
        return j in chosen.columns.tolist() or i // 128 - j // 128 in chosen.diagonals.tolist()
    return isinstance(pattern, Grid) and on_grid(i, j, pattern, tokens, chosen)


def on_grid(i: int, j: int, grid: Grid, tokens: TokenMap, chosen: Chosen) -> bool:
    if tokens.place[j] < Place.TEXT or (grid.tail and i >= tokens.tail):
        return True
    classes = tokens.classes(chosen.axis)
    of_i, of_j = int(classes.of_token[i]), int(classes.of_token[j])
    if (grid.vertical and of_j in chosen.classes.tolist()) or (grid.horizontal and of_i in chosen.classes.tolist()):
        return True
    if not grid.slash or min(of_i, of_j) < 0 or tokens.item[i] != tokens.item[j]:
        return False
    space = int(classes.spaces[of_i])
    size = classes.starts[space + 1] - classes.starts[space]
    return [space, (of_i - of_j) % size] in chosen.shifts.tolist()


@settings(deadline=None, max_examples=60)
@given(st.data(), few, patterns)
def test_masks_are_what_the_specification_says(data, tokens, pattern):
    chosen = data.draw(choices(pattern, tokens))
    expected = [[sees(i, j, pattern, tokens, chosen) for j in range(len(tokens))] for i in range(len(tokens))]
    assert mask(pattern, tokens, chosen).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(st.data(), far_apart, patterns)
def test_far_entries_are_what_the_specification_says(data, tokens, pattern):
    chosen = data.draw(choices(pattern, tokens))
    i, j = (data.draw(st.integers(0, len(tokens) - 1)) for _ in range(2))
    assert bool(mask(pattern, tokens, chosen)[i, j]) == sees(i, j, pattern, tokens, chosen)


@settings(deadline=None, max_examples=60)
@given(st.data(), maps)
def test_every_row_sees_itself_and_nothing_ahead(data, tokens):
    unit = data.draw(units(tokens, head_plans.filter(lambda plan: "Blocks" not in repr(plan))))
    seen_SS = unit_mask(unit, tokens)
    assert seen_SS.diagonal().all() and not seen_SS.triu(1).any()
    assert not (unit_mask(unit, tokens, sparse_rows=True) & ~seen_SS).any()
