"""A twin of FlashAttention-4's block lists in plain torch, and what lists and programs show, token by token.

T rows, K keys, Hq query heads, D head dim; S slots of 128 rows, M = 128 S, N packed keys, L places of a list.
"""

import torch
from torch import Tensor

from sglang_mm.kernels import empty_state, fa4_backend, merge
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.types import TileProgram
from tests.exactness.decode import times_shown
from tests.exactness.layers import SCALE


class Twin:
    """The library's call in fp32, and Triton's by the reference; refuses lists that FA4 makes no promise for."""

    def __init__(self, monkeypatch):
        self.calls, self.rests, self.takes_rest = [], [], True
        monkeypatch.setattr(fa4_backend, "block_sparse_attention", self.call)
        monkeypatch.setattr(fa4_backend, "attend_rest", self.rest)

    def call(self, q_1MHD, k_1NHD, v_1NHD, count_1HS, index_1HSL, scale) -> tuple[Tensor, Tensor]:
        self.calls.append(index_1HSL.shape)
        _, rows, heads, dim = q_1MHD.shape
        kv_heads, tiles = k_1NHD.shape[2], k_1NHD.shape[1] // 128
        assert k_1NHD.shape == v_1NHD.shape == (1, 128 * tiles, kv_heads, dim) and heads % kv_heads == 0
        assert q_1MHD.dtype == k_1NHD.dtype == v_1NHD.dtype and q_1MHD.is_contiguous() and rows % 128 == 0
        assert count_1HS.shape == index_1HSL.shape[:3] == (1, heads, rows // 128) and index_1HSL.shape[3] <= tiles
        assert count_1HS.dtype == index_1HSL.dtype == torch.int32 and index_1HSL.is_contiguous()
        out, lse = torch.zeros(1, rows, heads, dim), torch.full((1, heads, rows), float("-inf"))
        for head, slot in (count_1HS[0] > 0).nonzero().tolist():
            blocks = index_1HSL[0, head, slot, : count_1HS[0, head, slot]].tolist()
            assert all(a < b for a, b in zip([-1, *blocks], [*blocks, tiles])), "not ascending"
            keys = torch.cat([torch.arange(128 * block, 128 * block + 128) for block in blocks])
            at, kv_head = slice(128 * slot, 128 * slot + 128), head // (heads // kv_heads)
            scores = q_1MHD[0, at, head].float() @ k_1NHD[0, keys, kv_head].float().T * scale
            lse[0, head, at] = torch.logsumexp(scores, 1)
            out[0, at, head] = torch.softmax(scores, 1) @ v_1NHD[0, keys, kv_head].float()
        return out.to(q_1MHD.dtype), lse

    def rest(self, q_THD, packer, program, scale, out, lse, align=1) -> None:
        self.rests.append(program)
        if self.takes_rest:
            merge(out, lse, *attend_tiles(q_THD, packer.k_KHD, packer.v_KHD, program, scale=scale))


def run(program: TileProgram, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = empty_state(q)
    fa4_backend.attend(q, k, v, program, SCALE, *state)
    return state


def times_listed(program: TileProgram, heads: int) -> Tensor:
    """uint8 [Hq, T, K]: how often FA4's lists show each key to each row, found by running them.

    All scores are 0 and value k is the k-th unit vector, so out * exp(lse) counts. Wrong by no more than 1e-4 for a
    thousand keys in fp32.
    """
    rows, keys = len(program.pos_q), len(program.pos_k)
    values = torch.eye(keys)[:, None].expand(keys, heads // program.group, keys)
    out, lse = run(program, torch.zeros(rows, heads, keys), torch.zeros_like(values), values)
    return (out * lse.T.exp()[..., None]).round().to(torch.uint8).transpose(0, 1)


def by_head(program: TileProgram, heads: int) -> Tensor:
    """uint8 [Hq, T, K]: what the program's tables show."""
    counts = torch.zeros(heads, len(program.pos_q), len(program.pos_k), dtype=torch.uint8)
    for unit, shown in zip(program.heads, times_shown(program)):
        counts[list(unit)] = shown
    return counts


def assert_divided(program: TileProgram, heads: int, twin: Twin) -> int:
    """FA4's lists and Triton's program show what the program shows, and no more. Returns how much the lists show."""
    twin.takes_rest = False
    listed, expected = times_listed(program, heads), by_head(program, heads)
    rest = twin.rests.pop() if twin.rests else None
    assert torch.equal(listed + (0 if rest is None else by_head(rest, heads)), expected)
    if rest is not None:
        assert (rest.key_ptr.diff()[rest.full_tile.long()] < 128).all() and (rest.full_count == 1).all()
    return int(listed.sum())
