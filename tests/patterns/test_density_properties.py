"""Counts without a table equal the mask's sum: every pattern, every boundary, every pair of modalities."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.patterns.density import density, pairs
from sglang_mm.patterns.masks import mask, unit_mask
from sglang_mm.types import Modality
from tests.patterns.strategies import choices, grids, maps, patterns, units, vertical_slashes


@settings(deadline=None, max_examples=150)
@given(st.data(), maps, patterns | grids | vertical_slashes)
def test_pairs_are_the_masks_sum(data, tokens, pattern):
    chosen = data.draw(choices(pattern, tokens))
    rows, keys = (data.draw(st.sampled_from([None, *Modality])) for _ in range(2))
    seen_SS = mask(pattern, tokens, chosen)
    if rows is not None:
        seen_SS &= (tokens.modality == rows)[:, None]
    if keys is not None:
        seen_SS &= (tokens.modality == keys)[None, :]
    assert pairs(pattern, tokens, chosen, rows, keys) == int(seen_SS.sum())
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens) - 1)] * 2)))
    assert pairs(pattern, tokens, chosen, rows, keys, range(first, last + 1)) == int(seen_SS[first : last + 1].sum())


@settings(deadline=None, max_examples=60)
@given(st.data(), maps)
def test_density_is_the_masks_share_of_causal_attention(data, tokens):
    unit = data.draw(units(tokens))
    seen_SS = unit_mask(unit, tokens)
    assert density(unit, tokens) == int(seen_SS.sum()) / int(seen_SS.new_ones(seen_SS.shape).tril().sum())
