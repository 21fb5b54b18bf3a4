"""Any pattern, boundary, head group, ownership and tile size: programs show the mask, once, and attention is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.kernels.tiles import attend_tiles
from tests.exactness.decode import times_shown
from tests.exactness.layers import SCALE, Layer, one_rank
from tests.exactness.oracle import allowed, assert_exact, errors, exact
from tests.exactness.strategies import crossings, layers, seeds

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@settings(deadline=None, max_examples=45)
@given(layers() | layers(crossings))
def test_entries_show_the_mask_and_nothing_twice(layer: Layer):
    assert torch.equal(layer.times_shown(), layer.masks.byte())


@settings(deadline=None, max_examples=45)
@given(layers() | layers(crossings), st.sampled_from(DTYPES), seeds)
def test_values_are_those_of_one_softmax_over_the_mask(layer: Layer, dtype, seed):
    qkv = layer.random_qkv(dtype, seed)
    assert_exact(layer.attend(*qkv), *qkv, layer.seen_by_head(), layer.merges)


@settings(deadline=None, max_examples=14)
@given(layers(), seeds)
def test_ranks_give_what_one_rank_gives(layer: Layer, seed):
    qkv, seen_HSS = layer.random_qkv(seed=seed), layer.seen_by_head()
    alone = one_rank(layer.tokens, *layer.selection.units, group=layer.selection.group, sparse_rows=layer.sparse_rows)
    assert torch.equal(layer.times_shown(), alone.times_shown())
    whole = alone.attend(*qkv)
    limits = allowed(exact(*qkv, seen_HSS), *qkv, seen_HSS, torch.float64, layer.merges)
    for error, limit in zip(errors(layer.attend(*qkv), whole), limits):
        assert error <= limit


@settings(deadline=None, max_examples=14)
@given(layers())
def test_every_row_has_a_key_and_a_piece_without_one_is_empty(layer: Layer):
    """No partial result is NaN: a row sees keys of a piece, or gets (0, -inf) there."""
    assert layer.masks.any(-1).all()
    q, k, v = layer.random_qkv(torch.float32)
    for rows, keys, program in layer.programs:
        out, lse = attend_tiles(q[rows], k[keys], v[keys], program, scale=SCALE)
        nothing_UT = (times_shown(program) == 0).all(-1)
        for unit, heads in enumerate(program.heads):
            assert torch.equal(lse[list(heads)] == float("-inf"), nothing_UT[unit].expand(len(heads), -1))
            assert not out[nothing_UT[unit]][:, list(heads)].any()
        assert out.isfinite().all() and not lse.isnan().any()
    assert all(part.isfinite().all() for part in layer.attend(q, k, v))
