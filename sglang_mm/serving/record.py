"""What ran for each request: attached to SGLang's output, so that meta info, logs and metrics tell the same.

docs/observability.md explains each field. Seconds and bytes are those of the batch, `batch` says of how many requests.
"""

import logging
from collections import OrderedDict

from sglang_mm.serving.plan import PrefillPlan
from sglang_mm.serving.sight import tokens_of_batch
from sglang_mm.serving.sparse_record import join_chunks

KEY = "sglang_mm"  # in a response's meta_info: a list with one record
REMEMBERED = 256
logger = logging.getLogger(__name__)
_unfinished: set[str] = set()  # requests whose prompt goes on after the batch that was made last


def note_chunks(forward_batch, _class, batch, *_args, **_kwargs):
    """After-hook on SGLang's ForwardBatch.init_new: only SGLang's own batch knows which prompts go on after it."""
    if forward_batch.forward_mode.is_extend_without_speculative():
        _unfinished.clear()
        _unfinished.update(req.rid for req in batch.reqs if req.extend_end != len(req.full_untruncated_fill_ids))
    return forward_batch


def sharded_records(plan: PrefillPlan, forward_batch, *, vision: str) -> list[dict]:
    """One record per request of a sharded batch, when it has run. Collective. vision: as in Config."""
    seconds, sent, across = plan.sight.measured()
    shared = {"bytes_sent": sent, "seconds": seconds, "cached_by": plan.cached}
    if plan.transport.nodes > 1:
        shared["bytes_across_nodes"] = across
    if vision == "frames":  # else SGLang encodes on every rank, or finds what it has encoded
        shared["frames_encoded"] = plan.new_frames
    shared["predicted_seconds"] = {name: round(value, 6) for name, value in plan.predicted.items()}
    sparse = plan.sparse_told()
    return [
        _record(forward_batch, i, plan.schedule, plan.request_rows(i), plan.tokens[i], [], **shared, **sparse[i])
        for i in range(forward_batch.batch_size)
    ]


def stock_records(forward_batch, ranks: int, reason: str) -> list[dict]:
    """One record per request of a batch that will take SGLang's own path: every rank computes every row."""
    fallbacks, tokens = [reason] if reason else [], tokens_of_batch(forward_batch)
    return [
        _record(forward_batch, i, "stock", [forward_batch.extend_seq_lens_cpu[i]] * ranks, tokens[i], fallbacks)
        for i in range(forward_batch.batch_size)
    ]


def _record(forward_batch, request: int, schedule: str, rows: list[int], tokens: dict, fallbacks: list, **measured):
    return {
        "schedule": schedule,
        "ranks": len(rows),
        "rows_per_rank": rows,
        "new_tokens": forward_batch.extend_seq_lens_cpu[request],
        "cached_tokens": forward_batch.extend_prefix_lens_cpu[request],
        "tokens": tokens,
        "chunks": 1,
        "batch": forward_batch.batch_size,
        **measured,
        "fallbacks": fallbacks,
    }


class ChunkLog:
    """The records of prompts that come in chunks, joined: SGLang shows a response the last chunk's alone."""

    def __init__(self):
        self._last: OrderedDict[str, dict] = OrderedDict()

    def chunks_before(self, forward_batch) -> int:
        """Of the batch's request with most."""
        found = [self._earlier(forward_batch, i) for i in range(forward_batch.batch_size)]
        return max((record["chunks"] for record in found if record), default=0)

    def join(self, forward_batch, records: list[dict]) -> list[dict]:
        """The records of a batch, each with those of its request's earlier chunks added."""
        joined = []
        for i, record in enumerate(records):
            earlier = self._earlier(forward_batch, i)
            joined.append(_sum(earlier, record) if earlier else record)
            rid = forward_batch.rids[i] if forward_batch.rids else None
            if rid in _unfinished:
                self._last[rid] = joined[i]
                self._last.move_to_end(rid)
            else:  # a request that was retracted, or another of that name, begins anew
                self._last.pop(rid, None)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return joined

    def _earlier(self, forward_batch, i: int) -> dict | None:
        """A record of the same request that ended where this chunk begins."""
        record = self._last.get(forward_batch.rids[i]) if forward_batch.rids else None
        prefix = forward_batch.extend_prefix_lens_cpu[i]
        return record if record and record["cached_tokens"] + record["new_tokens"] == prefix else None


def _sum(earlier, later):
    """Numbers are added, lists of them place by place, names joined; what only one of them has is taken over."""
    if isinstance(later, dict):
        both = {key: _sum(earlier[key], later[key]) for key in earlier.keys() & later.keys() - {"sparse"}}
        if "sparse" in later and "sparse" in earlier:
            both["sparse"] = join_chunks(earlier["sparse"], later["sparse"])
        joined = {**earlier, **later, **both}
        for key in ("cached_tokens", "ranks", "batch") if "schedule" in later else ():
            joined[key] = earlier[key]
        return joined
    if isinstance(later, str):
        return earlier if later in earlier.split("+") else f"{earlier}+{later}"
    if isinstance(later, list):
        if any(isinstance(value, str) for value in (*earlier, *later)):
            return list(dict.fromkeys([*earlier, *later]))
        return [_sum(a, b) for a, b in zip(earlier, later, strict=True)]
    return round(earlier + later, 6)


class FallbackLog:
    """Says in the log why batches are not sharded, once per reason; requests.py counts them."""

    def __init__(self):
        self.said: set[str] = set()

    def note(self, reason: str, forward_batch) -> None:
        if reason not in self.said:
            self.said.add(reason)
            logger.info(
                "not sharded: %s (%s new tokens); dense and exact on every rank. Said once per reason, counted at "
                "/sglang_mm/status, told in each response's meta_info.",
                reason,
                forward_batch.extend_seq_lens_cpu,
            )
