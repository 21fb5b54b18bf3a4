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
from sglang_mm.parallel.gather import GatherTables
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.transport import Transport
from sglang_mm.parallel.vision import EmbeddingExchange, plan_exchange
from sglang_mm.serving.kept_frames import KeptFrames
from sglang_mm.serving.media import MediaSource, read_batch
from sglang_mm.serving.resting import Resting
from sglang_mm.serving.schedule import ScheduleChoice
from sglang_mm.serving.sight import Sight, progress_of, tokens_of_batch
from sglang_mm.serving.sparse_plan import SparsePart, choose_sparse, plan_sparse
from sglang_mm.types import BatchLayout, Frame, Residence, digest64

ATTRIBUTE = "sglang_mm_plan"  # on SGLang's ForwardBatch, read by the attention backend


@dataclass(frozen=True, eq=False)
class PrefillPlan:
    """layout: which rank computes which row. holdings: which keys each rank brings. resting: where keys rest.

    cached: how rows meet the keys of their prefixes: `none` are cached, they are `here`, on every rank, or `keys`
    travel with the new ones, or `queries` travel to them. exchange: which rank encodes which frame, and the way of its
    tokens. sources[request][item]: where the pixels of a media item are. kept: per request, what its earlier chunks
    encoded. tokens: per request, the new ones by modality. schedule: `ring` or `gather`. predicted: seconds by
    schedule, where they decided. sight: what is shown of it. sparse: which keys heads attend to, None for all.
    flat_by_rank: indices of a rank's rows in the flat batch, int64 on the device. new_frames: per rank, how many frames
    meet the vision tower.
    """

    layout: BatchLayout
    holdings: Holdings
    residence: Residence
    resting: Resting
    cached: str
    exchange: EmbeddingExchange
    sources: list[list[MediaSource]]
    kept: list[KeptFrames]
    tokens: list[dict[str, int]]
    schedule: str
    predicted: dict[str, float]
    sight: Sight
    transport: Transport
    device: torch.device
    flat_by_rank: list[torch.Tensor]
    sparse: SparsePart | None = None
    new_frames: list[int] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "new_frames", [sum(map(self._is_new, own)) for own in self.exchange.encode])

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

    @cached_property
    def gather_tables(self) -> GatherTables:
        return GatherTables(self.layout, self.device, self.holdings)

    def first_rows(self, rank: int) -> torch.Tensor:
        """int64 [requests + 1] on the device: where the rows of each request begin among the rank's, and their end."""
        if rank not in self._first_rows:
            stops = [segment.stop for segment in self.layout.segments(rank)]
            self._first_rows[rank] = torch.tensor([0, *stops], device=self.device)
        return self._first_rows[rank]

    @cached_property
    def _first_rows(self) -> dict[int, torch.Tensor]:
        return {}

    def request_rows(self, request: int) -> list[int]:
        """Rows of one request on every rank."""
        return [len(rows) for rows in self.layout.requests[request].rows]

    def at_hand(self, request: int, frame: Frame) -> torch.Tensor | None:
        """Embeddings [frame.length, H] that an earlier chunk left on this rank, or that the client sent."""
        source = self.sources[request][frame.item]
        if source.embeddings is not None:
            return source.rows(frame.index, frame.length)
        return self.kept[request].embeddings.get(frame.key)

    def keep_cut_frames(self, encoded: list[torch.Tensor]) -> None:
        """encoded: embeddings of the frames in exchange.encode of this rank, in that order."""
        for request, (kept, layout) in enumerate(zip(self.kept, self.layout.requests)):
            frames = [[frame for r, frame in own if r == request] for own in self.exchange.encode]
            own = zip(self.exchange.encode[self.rank], encoded, strict=True)
            mine = {frame.key: rows for (r, frame), rows in own if r == request}
            kept.renew(frames, mine, layout.start + layout.length)

    def sparse_told(self) -> list[dict]:
        """Per request what its record has of sparse attention. Collective."""
        requests = len(self.layout.requests)
        return self.sparse.told(requests) if self.sparse else [{}] * requests

    def _is_new(self, pair: tuple[int, Frame]) -> bool:
        request, frame = pair
        return self.sources[request][frame.item].embeddings is None and frame.key not in self.kept[request].holder


def reason_for_stock(forward_batch, config: Config, *, is_sparse: bool = False) -> str | None:
    """Why this extend batch must take SGLang's own path on every rank, or None when it can be sharded.

    is_sparse: one of its requests is to be sparse, however short.
    """
    if forward_batch.forward_mode != ForwardMode.EXTEND:
        return "batch mixes prefill with decode or speculation"
    longest = max(forward_batch.extend_seq_lens_cpu)
    if longest < config.cp:
        return "fewer new tokens than ranks"
    if not is_sparse and max(longest, _largest_medium(forward_batch)) < config.cp_min_tokens:
        return "below --cp-min-tokens"
    if forward_batch.capture_hidden_mode.need_capture():
        return "hidden states requested"
    if forward_batch.multi_item_delimiter_indices is not None or forward_batch.token_indices_to_pool is not None:
        return "multi-item scoring"
    if forward_batch.input_embeds is not None:
        return "input embeddings given instead of ids"
    return None


def _largest_medium(forward_batch) -> int:
    """Tokens of the largest image or video that the batch's new rows touch.

    The stock path would encode all of it on every rank, be it for the last rows of a chunked or half cached prompt.
    """
    largest = 0
    for mm_inputs, prefix, new in zip(
        forward_batch.mm_inputs or [], forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
    ):
        for item in mm_inputs.mm_items if mm_inputs is not None else ():
            touched = [
                last + 1 - first for first, last in item.offsets or () if first < prefix + new and last >= prefix
            ]
            largest = max(largest, *touched, 0)
    return largest


def plan_prefill(forward_batch, model, transport: Transport, schedules: ScheduleChoice, chunk: int) -> PrefillPlan:
    """Lay out one extend batch. model: ours, with `visual`, SGLang's vision tower, and `model`, the decoder.

    chunk: how many chunks of its requests went before. Raises UnreadableMedia, on all ranks alike.
    """
    media = read_batch(forward_batch, model.visual)
    layouts, frames = [], []
    for (spans, _), prefix, new in zip(
        media, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
    ):
        layouts.append(make_layout(runs_of(spans, prefix, prefix + new), transport.size))
        frames.append(frames_of(spans))
    layout = BatchLayout(tuple(layouts))
    kept = [KeptFrames.of(mm_inputs) for mm_inputs in forward_batch.mm_inputs or [None] * len(layouts)]
    exchange = plan_exchange(frames, layout, [frames.holder for frames in kept])
    residence, device = model.mm_residence, forward_batch.input_ids.device
    cached = schedules.way_to_cached(layout, residence, model.model)
    holdings = Holdings(layout, residence if cached == "keys" else None)
    schedule, predicted = schedules.choose(layout, model.model, holdings, done_before=cached == "queries")
    flat = [layout.flat(r).to(device) for r in range(transport.size)]
    transport.meter.take()
    choice = choose_sparse(forward_batch, model.mm_prompts) if model.mm_sparse else None
    ring = f"{transport.nodes},{residence.ranks},{residence.page}"
    words = f"{schedule},{cached},{ring},{choice.words(model.mm_sparse) if choice else ''}"
    transport.check_equal(digest64([layout.digest(), exchange.digest(), words]), "prefill plan")
    progress = progress_of(forward_batch, transport.rank, transport.size, len(model.model.layers), schedule, chunk)
    sight = Sight(progress, transport)
    return PrefillPlan(
        layout=layout,
        holdings=holdings,
        residence=residence,
        resting=Resting(forward_batch, layout, holdings, residence, flat),
        cached=cached,
        exchange=exchange,
        sources=[sources for _, sources in media],
        kept=kept,
        tokens=tokens_of_batch(forward_batch),
        schedule=schedule,
        predicted=predicted,
        sight=sight,
        sparse=plan_sparse(model, choice, layout, cached, sight.watch) if choice else None,
        transport=transport,
        device=device,
        flat_by_rank=flat,
    )
