"""A mixin that makes an SGLang model own context parallelism.

SGLang is started with tp_size = T * C and attn_cp_size = C. Inside `narrowed()` the model sees a plain T-way
tensor-parallel world, so its layers are those of a single T-way replica; `forward` gives each of the C replicas its
own rows, and the attention backend brings the keys of the others.
"""

import logging
from contextlib import nullcontext
from functools import wraps

import torch
from sglang.srt.distributed.parallel_state import patch_tensor_parallel_group
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from sglang_mm.config import Config
from sglang_mm.parallel.distributed import DistributedTransport
from sglang_mm.serving import agreement, faults
from sglang_mm.serving.embed import embed_rows
from sglang_mm.serving.kv_pool import residence_of
from sglang_mm.serving.logits import logits_of
from sglang_mm.serving.media import UnreadableMedia
from sglang_mm.serving.plan import ATTRIBUTE, PrefillPlan, plan_prefill, reason_for_stock
from sglang_mm.serving.prompts import KnownPrompts
from sglang_mm.serving.record import KEY, ChunkLog, FallbackLog, sharded_records, stock_records
from sglang_mm.serving.schedule import ScheduleChoice, shape_of
from sglang_mm.serving.sight import progress_of
from sglang_mm.serving.sparse_method import SparseMethod
from sglang_mm.serving.sparse_plan import told_of_stock, wants_sparse

ROWS_AT_ONCE = 16384  # in the feed-forward layers
logger = logging.getLogger(__name__)


class ContextParallelMixin:
    """Put before SGLang's model class; needs its `model`, `visual`, `lm_head`, `logits_processor`."""

    def __init__(self, *args, **kwargs):
        parallel = get_parallel()
        # plain attributes: nn.Module.__init__ has not run yet, and must run inside the narrowed scope
        object.__setattr__(self, "mm_config", Config.from_env() or Config())
        group = parallel.attn_cp_group if self.mm_config.cp > 1 else None
        object.__setattr__(self, "mm_transport", self._transport(group, self.mm_config.nodes) or self._alone(parallel))
        rank = self.mm_transport.rank if self.mm_transport else 0
        object.__setattr__(self, "mm_residence", residence_of(self.mm_config, rank))
        replica = parallel.attn_tp_group if self.mm_config.computes_prefill and self.mm_config.tp > 1 else None
        object.__setattr__(self, "mm_replica", self._transport(replica))
        agreement.join(*((self.mm_replica, self.mm_transport) if self.mm_config.cp > 1 else ()))
        faults.join(self.mm_transport, self.mm_replica)
        object.__setattr__(self, "mm_schedules", ScheduleChoice(self.mm_config, self.mm_transport))
        object.__setattr__(self, "mm_fallbacks", FallbackLog())
        object.__setattr__(self, "mm_chunks", ChunkLog())
        object.__setattr__(self, "mm_tp_group", parallel.attn_tp_group)
        with self.narrowed():
            super().__init__(*args, **kwargs)
        object.__setattr__(self, "mm_sparse", self._sparse_method(parallel))
        for layer in self.model.layers:
            layer.mlp.forward = in_slices(layer.mlp.forward)

    def _transport(self, group, nodes: int = 1) -> DistributedTransport | None:
        if group is None:
            return None
        return DistributedTransport(group.device_group, group.ranks, group.device, self.mm_config.deadline_s, nodes)

    def _alone(self, parallel) -> DistributedTransport | None:
        """The ring of one rank, where prefills are ours though none is sharded."""
        if not self.mm_config.computes_prefill:
            return None
        return DistributedTransport(None, [0], parallel.attn_tp_group.device, self.mm_config.deadline_s)

    def _sparse_method(self, parallel) -> SparseMethod | None:
        object.__setattr__(self, "mm_prompts", None)
        if not self.mm_config.is_sparse:
            return None
        shape, fewest = shape_of(self.model), self.mm_config.sparse_min_tokens
        object.__setattr__(self, "mm_prompts", KnownPrompts(self.config, self.mm_transport.device, fewest))
        first, group = shape.q_heads * parallel.attn_tp_rank, shape.q_heads // shape.kv_heads
        return SparseMethod(self.mm_config, first, shape.q_heads, group)

    def narrowed(self):
        """Scope in which SGLang's layers see T ranks; needed at construction, loading and every forward."""
        if self.mm_config.cp == 1:
            return nullcontext()
        return patch_tensor_parallel_group(self.mm_tp_group, owns_attention=True)

    def load_weights(self, weights):
        with self.narrowed():
            loaded = super().load_weights(weights)
            self.mm_schedules.prepare(self.model)
            return loaded

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch, *args, **kwargs):
        with self.narrowed():
            if forward_batch.forward_mode not in (ForwardMode.EXTEND, ForwardMode.MIXED):
                with faults.decoding():
                    return super().forward(input_ids, positions, forward_batch, *args, **kwargs)
            plan, reason = self._plan(forward_batch, more_than_generation=bool(args) or any(kwargs.values()))
            if plan:
                output, records = self._forward_sharded(input_ids, forward_batch, plan)
            else:
                records = stock_records(forward_batch, self.mm_config.cp, reason)
                if self.mm_sparse:
                    told = told_of_stock(forward_batch, self.mm_sparse, self.mm_prompts)
                    records = [{**record, **sparse} for record, sparse in zip(records, told)]
                with self._stock_progress(forward_batch) as progress:
                    output = super().forward(input_ids, positions, forward_batch, *args, **kwargs)
                    records = self.mm_chunks.join(forward_batch, records)
                    progress.records = dict(zip(forward_batch.rids or [], records))
        # elsewhere on a device, counting would make the host wait for the whole batch
        counts = plan is not None or input_ids.device.type == "cpu"
        if counts and records and (differing := agreement.differing_tokens()):
            records[0]["differing_tokens"] = differing
        if hasattr(output, "customized_info"):
            output.customized_info = {**(output.customized_info or {}), KEY: records}
        return output

    def _plan(self, forward_batch, more_than_generation: bool) -> tuple[PrefillPlan | None, str]:
        """The plan of a batch that is sharded; or None, and why not (nothing to say with one replica)."""
        if self.mm_transport is None:
            return None, ""
        is_sparse = wants_sparse(forward_batch, self.mm_prompts)
        if self.mm_config.cp == 1 and not is_sparse:
            return None, ""
        reason = reason_for_stock(forward_batch, self.mm_config, is_sparse=is_sparse)
        if more_than_generation:
            reason = "embeddings requested"
        if not reason:
            try:
                chunk = self.mm_chunks.chunks_before(forward_batch)
                return plan_prefill(forward_batch, self, self.mm_transport, self.mm_schedules, chunk), ""
            except UnreadableMedia as error:
                logger.warning("media is not sharded: %s", error)
                reason = "media in a form that only SGLang's own path reads"
        self.mm_fallbacks.note(reason, forward_batch)
        return None, reason

    def _stock_progress(self, forward_batch):
        rank = self.mm_transport.rank if self.mm_transport else 0
        chunk = self.mm_chunks.chunks_before(forward_batch)
        return progress_of(forward_batch, rank, self.mm_config.cp, len(self.model.layers), "stock", chunk)

    def _forward_sharded(self, input_ids, forward_batch, plan: PrefillPlan) -> tuple[object, list[dict]]:
        """(SGLang's logits output, one record per request)"""
        with plan.sight.running():
            embeds = embed_rows(self, plan, input_ids, forward_batch)
            hidden = self._run_decoder(embeds, forward_batch, plan)
            if plan.sparse:
                plan.sparse.prefill.done()
            with plan.sight.stage("logits"):
                output = logits_of(self, hidden, plan, input_ids, forward_batch)
            records = sharded_records(plan, forward_batch, vision=self.mm_config.vision)
            records = self.mm_chunks.join(forward_batch, records)
            plan.sight.progress.records = dict(zip(forward_batch.rids or [], records))
        return output, records

    def _run_decoder(self, embeds: torch.Tensor, forward_batch, plan: PrefillPlan) -> torch.Tensor:
        """[t, H] -> [t, H] for this rank's rows; the attention backend finds the plan on the batch."""
        positions = forward_batch.mrope_positions[:, plan.rows]
        setattr(forward_batch, ATTRIBUTE, plan)
        try:
            with plan.sight.stage("layers"):
                return self.model(input_ids=None, positions=positions, forward_batch=forward_batch, input_embeds=embeds)
        finally:
            delattr(forward_batch, ATTRIBUTE)


def in_slices(feed_forward, most_rows: int = ROWS_AT_ONCE):
    """feed_forward(rows [t, H], ...) -> [t, H], which works row by row, in calls of bounded size.

    Its inner values are five times as wide as a row: for a long prompt they would be the largest thing on a rank, twice
    the K/V that it keeps.
    """

    @wraps(feed_forward)
    def sliced(rows: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if len(rows) <= most_rows:
            return feed_forward(rows, *args, **kwargs)
        out = torch.empty_like(rows)
        for first in range(0, len(rows), most_rows):
            few = slice(first, first + most_rows)
            out[few] = feed_forward(rows[few], *args, **kwargs)
        return out

    return sliced
