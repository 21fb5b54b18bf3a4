"""The attention backend `mm_paged`: rows that every rank computes, over K/V that the ranks share page by page.

Decoding, and prompts too short to be sharded. All ranks hold the same query rows; each attends to the keys that rest
with it, and partial results are merged in the order of the ranks, so that all go on with the same bits.

    rank 0   rows x its keys --.
    rank 1   rows x its keys --+-- every rank: all partial results, merged: rows x all keys
    rank 2   rows x its keys --'
"""

import logging

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_mm.events.vitals import vitals
from sglang_mm.kernels import causal_attention, merge
from sglang_mm.kernels.merge import join_partials
from sglang_mm.kernels.paged import PageTable, backend_for, paged_attention
from sglang_mm.serving.schedule import shape_of

logger = logging.getLogger(__name__)
ROWS_AT_ONCE = 1024  # of a prompt over its cached prefix: bounds the partial results of all ranks


class PagedAttentionBackend(AttentionBackend):
    """Shapes at the SGLang seam: q [t, Hq * D], k and v [t, Hkv, D], the same t rows on every rank; out [t, Hq * D].

    On a GPU a decode step has no shape that depends on what is on the device, and its host reads nothing from there.
    """

    def __init__(self, runner):
        super().__init__()
        self.transport, self.residence = runner.model.mm_transport, runner.model.mm_residence
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.needs_cpu_seq_lens = runner.device == "cpu"  # there the shapes come from them
        self._tell_of_slow_kernel(shape_of(runner.model.model).q_heads)

    def _tell_of_slow_kernel(self, heads: int) -> None:
        """On a GPU where the kernel cannot run, plain torch does, and waits for the device in every layer."""
        k, _ = self.token_to_kv_pool.get_kv_buffer(0)
        kernel = backend_for(k.new_empty(1, heads, k.shape[-1]), k)
        if self.device != "cpu" and kernel == "reference":
            logger.warning("decoding is slow: no kernel for %d query heads over K/V %s", heads, tuple(k.shape[1:]))

    def init_forward_metadata(self, forward_batch):
        """What is needed is on the batch."""

    def support_triton(self) -> bool:
        return self.device != "cpu"

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        vitals.layer = layer.layer_id
        q, k, v = _by_heads(q, k, v, layer)
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        table = self._table(forward_batch, forward_batch.seq_lens, forward_batch.seq_lens_cpu)
        out, _ = self._over_all_ranks(q, layer, table)
        return out.to(q.dtype).reshape(len(q), -1)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        vitals.layer = layer.layer_id
        q, k, v = _by_heads(q, k, v, layer)
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        out = torch.empty_like(q)
        first = 0
        for request, length in enumerate(forward_batch.extend_seq_lens_cpu):
            rows, start = slice(first, first + length), forward_batch.extend_prefix_lens_cpu[request]
            positions = torch.arange(start, start + length)
            state = causal_attention(q[rows], k[rows], v[rows], positions, positions, scale=layer.scaling)
            if start:
                self._add_cached(state, q[rows], layer, forward_batch, request)
            out[rows] = state[0]
            first += length
        return out.reshape(len(q), -1)

    def _add_cached(self, state, q, layer, forward_batch, request: int) -> None:
        """Merge the cached prefix of one request into the state of its rows q [t, Hq, D]."""
        one = slice(request, request + 1)
        lengths = forward_batch.extend_prefix_lens[one], forward_batch.extend_prefix_lens_cpu[one]
        table = self._table(forward_batch, *lengths, one)
        for first in range(0, len(q), ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, len(q)))
            merge(state[0][rows], state[1][:, rows], *self._over_all_ranks(q[rows], layer, table, follow_up=True))

    def _table(self, forward_batch, lengths, lengths_cpu, requests: slice = slice(None)) -> PageTable:
        return PageTable(
            slots=self.req_to_token_pool.req_to_token,
            rows=forward_batch.req_pool_indices[requests],
            lengths=lengths,
            lengths_cpu=lengths_cpu,
            residence=self.residence,
        )

    def _over_all_ranks(self, q, layer, table: PageTable, follow_up: bool = False):
        """(out [t, Hq, D], lse [Hq, t]) over the keys of all ranks. follow_up: all rows are of one request."""
        ptr = torch.arange(2, device=q.device) * len(q) if follow_up else None  # made there: a copy would be waited for
        pools = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        out, lse = paged_attention(q, *pools, table, scale=layer.scaling, queries_ptr=ptr)
        packed = torch.cat([out, lse.T.unsqueeze(-1)], dim=-1)  # one message
        size = self.transport.size
        parts = self.transport.all_to_all([packed] * size, [len(q)] * size, "partial results", kind="partials")
        gathered = torch.stack(parts)
        return join_partials(gathered[..., :-1], gathered[..., -1].transpose(1, 2).contiguous())


def _by_heads(q, k, v, layer):
    return (
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
    )
