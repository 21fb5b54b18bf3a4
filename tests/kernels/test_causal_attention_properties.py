"""Random positions, heads and sizes: both backends equal dense fp64 attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_mm.kernels import causal_attention, merge
from tests.kernels.oracle import assert_matches

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
positions = st.sets(st.integers(0, 400), max_size=90)
ascending = positions.map(lambda chosen: torch.tensor(sorted(chosen), dtype=torch.int64))


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@given(
    pos_q=ascending,
    pos_k=ascending,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.integers(1, 96),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_any_positions(backend, pos_q, pos_k, kv_heads, group, dim, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(len(pos_q), kv_heads * group, dim, generator=draw, dtype=dtype)
    k, v = torch.randn(2, len(pos_k), kv_heads, dim, generator=draw, dtype=dtype)
    whole = causal_attention(q, k, v, pos_q, pos_k, scale=0.4, backend=backend)
    assert_matches(whole, q, k, v, pos_q, pos_k, 0.4)
    odd, even = slice(1, None, 2), slice(0, None, 2)
    merged = causal_attention(q, k[odd], v[odd], pos_q, pos_k[odd], scale=0.4, backend=backend)
    merge(*merged, *causal_attention(q, k[even], v[even], pos_q, pos_k[even], scale=0.4, backend=backend))
    assert_matches(merged, q, k, v, pos_q, pos_k, 0.4)
