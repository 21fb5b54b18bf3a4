"""What one prefill batch will do, decided the same on every rank before its first collective.

SGLang's schedulers are SPMD: every rank sees the same requests, lengths, cache slots and media, so each computes
this plan alone; a digest compared across ranks proves that they agree.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_mm.config import Config
from sglang_mm.modality import frames_of, runs_of
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.transport import Transport
from sglang_mm.parallel.vision import EmbeddingExchange, plan_exchange
from sglang_mm.serving.media import MediaSource, read_batch
from sglang_mm.types import BatchLayout, digest64

ATTRIBUTE = "sglang_mm_plan"  # on SGLang's ForwardBatch, read by the attention backend


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """layout: which rank computes which row. exchange: which rank encodes which frame, and the way of its tokens.

    sources[request][item]: where the pixels of a media item are.
    """

    layout: BatchLayout
    exchange: EmbeddingExchange
    sources: list[list[MediaSource]]
    transport: Transport
    device: torch.device
    flat_by_rank: list[torch.Tensor] = field(init=False)

    def __post_init__(self):
        flat = [self.layout.flat(r).to(self.device) for r in range(self.transport.size)]
        object.__setattr__(self, "flat_by_rank", flat)

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def rows(self) -> torch.Tensor:
        """Indices of this rank's rows in the flat batch, int64 on the device."""
        return self.flat_by_rank[self.rank]

    @cached_property
    def rows_per_rank(self) -> list[int]:
        return [self.layout.rows(r) for r in range(self.transport.size)]

    def request_rows(self, request: int) -> list[int]:
        """Rows of one request on every rank."""
        return [len(rows) for rows in self.layout.requests[request].rows]


def reason_for_stock(forward_batch, config: Config) -> str | None:
    """Why this extend batch must take SGLang's own path on every rank, or None when it can be sharded."""
    if forward_batch.forward_mode != ForwardMode.EXTEND:
        return "batch mixes prefill with decode or speculation"
    if max(forward_batch.extend_seq_lens_cpu) < max(config.cp_min_tokens, config.cp):  # every rank needs a row
        return "below --cp-min-tokens"
    if forward_batch.capture_hidden_mode.need_capture():
        return "hidden states requested"
    if forward_batch.multi_item_delimiter_indices is not None or forward_batch.token_indices_to_pool is not None:
        return "multi-item scoring"
    if forward_batch.input_embeds is not None:
        return "input embeddings given instead of ids"
    return None


def plan_prefill(forward_batch, tower, transport: Transport) -> PrefillPlan:
    """Lay out one extend batch. tower: SGLang's vision tower. Raises UnreadableMedia, on all ranks alike."""
    media = read_batch(forward_batch, tower)
    layouts, frames = [], []
    for (spans, _), prefix, new in zip(
        media, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
    ):
        layouts.append(make_layout(runs_of(spans, prefix, prefix + new), transport.size))
        frames.append(frames_of(spans))
    layout = BatchLayout(tuple(layouts))
    exchange = plan_exchange(frames, layout)
    transport.check_equal(digest64([layout.digest(), exchange.digest()]), "prefill plan")
    sources = [sources for _, sources in media]
    return PrefillPlan(layout, exchange, sources, transport, forward_batch.input_ids.device)
