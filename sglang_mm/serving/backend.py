"""The prefill attention backend `mm_ring`: SGLang tensors in, sharded attention, SGLang tensors out.

A batch without a plan (short, or of a kind that is not sharded) goes to the backend that also decodes: SGLang's own
where each rank keeps all K/V, `mm_paged` where they share them.
"""

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from sglang_mm.kernels import empty_state
from sglang_mm.kernels.paged import PageTable, paged_attention
from sglang_mm.parallel.gather import attend_gathered
from sglang_mm.parallel.pass_q import attend_resting
from sglang_mm.parallel.ring import attend_pieces, ring_pieces
from sglang_mm.serving.plan import ATTRIBUTE, PrefillPlan
from sglang_mm.serving.sparse_prefill import SparseLayer

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


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
        given = {"scale": layer.scaling, "watch": plan.sight.watch}
        if plan.sparse and plan.sparse.choice.known:
            given["attend"] = self._select(q, k, layer, plan)
        if plan.cached == "here":
            given["prefix"] = lambda request: self._cached(request, layer, plan)
        elif plan.cached == "keys":
            k, v = self._joined(k, v, layer, plan)
        elif plan.cached == "queries":
            given["state"] = self._asked_where_keys_rest(q, layer, plan, forward_batch, given.get("attend"))
        run = self._gathered if plan.schedule == "gather" else self._ring
        out = run(q, k, v, plan, layer, save_kv_cache, given)
        plan.sight.layer_done(layer.layer_id)
        return out.reshape(out.shape[0], -1)

    def _ring(self, q, k, v, plan: PrefillPlan, layer, keep: bool, given: dict) -> torch.Tensor:
        pieces = ring_pieces(k, v, plan.holdings.counts, plan.transport, watch=plan.sight.watch)
        if keep:
            pieces = self._kept(pieces, plan, layer)
        return attend_pieces(q, plan.layout, plan.rank, pieces, holdings=plan.holdings, **given)

    def _kept(self, pieces, plan: PrefillPlan, layer):
        """The pieces; of each, as it passes, this rank keeps the keys that shall rest with it."""
        for piece in pieces:
            rows, where = plan.resting.new(piece.source)
            self._write(layer, where, piece.k[rows], piece.v[rows])
            yield piece

    def _gathered(self, q, k, v, plan: PrefillPlan, layer, keep: bool, given: dict) -> torch.Tensor:
        rows, where = plan.resting.gathered

        def put_away(heads: slice, kv: torch.Tensor) -> None:
            for side, buffer in enumerate(self._buffers(layer)):
                buffer[:, heads][where] = kv[rows, side]

        if keep:
            given["keep"] = put_away
        return attend_gathered(q, k, v, plan.gather_tables, plan.transport, **given)

    def _write(self, layer, where: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """where: rows of this rank's buffers."""
        target = KVWriteLoc(where, physical=True)
        MHATokenToKVPool.set_kv_buffer(self.token_to_kv_pool, layer, target, k, v)

    def _buffers(self, layer) -> KeysAndValues:
        return self.token_to_kv_pool.get_kv_buffer(layer.layer_id)

    def _cached(self, request: int, layer, plan: PrefillPlan) -> KeysAndValues:
        """K and V [n, Hkv, D] of the request's cached keys that rest on this rank, by position."""
        rows = plan.resting.cached(request, self.req_to_token_pool.req_to_token)
        k, v = self._buffers(layer)
        return k[rows], v[rows]

    def _joined(self, k, v, layer, plan: PrefillPlan) -> KeysAndValues:
        """What this rank brings, as plan.holdings says: per request its resting keys, then the new ones."""
        parts = []
        for request, new in enumerate(plan.layout.segments(plan.rank)):
            parts += [self._cached(request, layer, plan), (k[new], v[new])]
        return tuple(torch.cat(side) for side in zip(*parts))

    def _select(self, q, k, layer, plan: PrefillPlan) -> SparseLayer:
        """What the heads of this layer attend to. k [t, Hkv, D] of this rank's rows."""
        segments, sparse = plan.layout.segments(plan.rank), plan.sparse.prefill

        def keys_of(request: int) -> torch.Tensor:
            new = k[segments[request]]
            if plan.cached == "none" or not plan.layout.requests[request].start:
                return new
            cached, _ = self._cached(request, layer, plan)
            if plan.cached == "here":  # on every rank: each scores a share
                cached = cached[sparse.own_cached(request).to(cached.device)]
            return torch.cat([cached, new])

        return sparse.layer(layer.layer_id, q, keys_of, layer.scaling)

    def _asked_where_keys_rest(self, q, layer, plan: PrefillPlan, forward_batch, sparse) -> KeysAndValues:
        """State of this rank's rows over all cached keys: queries travel. sparse: None for dense attention."""
        table = PageTable(
            slots=self.req_to_token_pool.req_to_token,
            rows=forward_batch.req_pool_indices,
            lengths=forward_batch.extend_prefix_lens,
            lengths_cpu=forward_batch.extend_prefix_lens_cpu,
            residence=plan.residence,
        )

        def attend_here(queries: torch.Tensor, source: int) -> KeysAndValues:
            if sparse is not None:
                return self._sparse_here(queries, source, layer, plan, sparse)
            pools, ptr = self._buffers(layer), plan.first_rows(source)
            return paged_attention(queries, *pools, table, scale=layer.scaling, queries_ptr=ptr)

        return attend_resting(q, plan.rows_per_rank, plan.transport, attend_here, watch=plan.sight.watch)

    def _sparse_here(self, queries, source: int, layer, plan: PrefillPlan, sparse: SparseLayer) -> KeysAndValues:
        """(out, lse) of the queries of rank `source` over the cached keys that rest here."""
        out, lse = empty_state(queries)
        for request, (rows, own) in enumerate(zip(plan.layout.segments(source), plan.layout.requests)):
            resting = plan.residence.positions(0, own.start)
            if len(own.rows[source]) and len(resting):
                given = queries[rows], *self._cached(request, layer, plan), own.rows[source], resting
                out[rows], lse[:, rows] = sparse.over_resting(request, source, *given)
        return out, lse


def stock_backend_name(runner) -> str:
    """The decode backend on this device also serves what is not sharded."""
    from sglang.srt.model_executor.model_runner_components.attention_backend_setup import attention_backends

    return attention_backends()[1]
