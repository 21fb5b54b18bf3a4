"""The prefill attention backend `mm_ring`: SGLang tensors in, sharded attention, SGLang tensors out.

A batch without a plan (short, or of a kind that is not sharded) takes SGLang's own backend, which is also the one
that decodes: K/V are replicated while they pass, so every stock decode backend works.
"""

from collections.abc import Callable, Iterator

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_mm.parallel.gather import attend_gathered
from sglang_mm.parallel.pieces import Piece
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.serving.plan import ATTRIBUTE, PrefillPlan

Keep = Callable[[Piece], None]


class RingAttentionBackend(AttentionBackend):
    """Shapes at the SGLang seam: q [t, Hq * D], k and v [t, Hkv, D] for this rank's t rows; out [t, Hq * D]."""

    def __init__(self, runner):
        super().__init__()
        self.stock = ATTENTION_BACKENDS[stock_backend_name(runner)](runner)
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.needs_cpu_seq_lens = self.stock.needs_cpu_seq_lens

    def init_forward_metadata(self, forward_batch):
        self.stock.init_forward_metadata(forward_batch)

    def support_triton(self) -> bool:
        return self.stock.support_triton()

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self.stock.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        plan = getattr(forward_batch, ATTRIBUTE, None)
        if plan is None:
            return self.stock.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        attend = self._gathered if plan.schedule == "gather" else self._ring
        given = {"scale": layer.scaling, "watch": plan.sight.watch}
        given["prefix"] = lambda request: self._cached_prefix(request, layer, forward_batch)
        keep = (lambda piece: self._write(piece, plan, layer, forward_batch)) if save_kv_cache else None
        out = attend(q, k, v, plan, keep, given)
        plan.sight.layer_done(layer.layer_id)
        return out.reshape(out.shape[0], -1)

    def _ring(self, q, k, v, plan: PrefillPlan, keep: Keep | None, given: dict) -> torch.Tensor:
        pieces = ring_pieces(k, v, plan.rows_per_rank, plan.transport, watch=plan.sight.watch)
        return attend_pieces(q, plan.layout, plan.rank, _kept(pieces, keep) if keep else pieces, **given)

    def _gathered(self, q, k, v, plan: PrefillPlan, keep: Keep | None, given: dict) -> torch.Tensor:
        return attend_gathered(q, k, v, plan.gather_tables, plan.transport, keep=keep, **given)

    def _write(self, piece: Piece, plan: PrefillPlan, layer, forward_batch) -> None:
        """Put a piece into this rank's K/V pool, at the slots the scheduler gave all ranks alike."""
        slots = forward_batch.out_cache_loc[plan.flat_by_rank[piece.source]]
        where = KVWriteLoc(slots, physical=forward_batch.out_cache_loc_is_physical)
        self.token_to_kv_pool.set_kv_buffer(layer, where, piece.k, piece.v)

    def _cached_prefix(self, request: int, layer, forward_batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V [prefix, Hkv, D] of the tokens a request found in the cache, which every rank holds."""
        length = forward_batch.extend_prefix_lens_cpu[request]
        if not length:
            return None
        row = forward_batch.req_pool_indices[request : request + 1]  # a number would make the host wait
        slots = self.req_to_token_pool.req_to_token[row, :length][0]
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id)[slots], pool.get_value_buffer(layer.layer_id)[slots]


def _kept(pieces: Iterator[Piece], keep: Keep) -> Iterator[Piece]:
    """The pieces, each kept as it passes."""
    for piece in pieces:
        keep(piece)
        yield piece


def stock_backend_name(runner) -> str:
    """SGLang's decode backend on this device also serves what is not sharded."""
    from sglang.srt.model_executor.model_runner_components.attention_backend_setup import attention_backends

    return attention_backends()[1]
