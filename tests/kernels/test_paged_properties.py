"""Random ranks, pages, lengths, heads, query rows: every rank, and all joined, equal dense fp64 attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.paged_cases import assert_exact, draw

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")


@st.composite
def cases(draw_from):
    """Lengths anywhere, or up to one token from a border of a page or a share."""
    ranks, share = draw_from(st.integers(1, 4)), draw_from(st.integers(1, 5))
    near = st.builds(lambda n, by: max(0, n * share + by), st.integers(0, 4 * ranks), st.integers(-1, 1))
    lengths = draw_from(st.lists(near | st.integers(0, 60), min_size=1, max_size=4))
    counts = draw_from(st.none() | st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 4))
    heads = (kv_heads * group, kv_heads, draw_from(st.integers(1, 24)))
    dtype, seed = draw_from(st.sampled_from([torch.float32, torch.float64])), draw_from(st.integers(0, 999))
    return draw(ranks, share, lengths, heads=heads, dtype=dtype, counts=counts, seed=seed)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_any_residence(backend, case):
    for rank, residence in enumerate(case.residences):
        assert_exact(case.attend(rank, backend), case, rank)
        kept = [len(residence.positions(0, length)) for length in case.lengths]
        assert residence.held(torch.tensor(case.lengths)).tolist() == kept
    assert_exact(case.everywhere(backend), case, merges=len(case.pools))
