"""What ran for each request: attached to SGLang's output, so that meta info, logs and counters tell the same."""

import logging

from sglang_mm.serving.plan import PrefillPlan

KEY = "sglang_mm"  # in a response's meta_info: a list with one record
logger = logging.getLogger(__name__)


def sharded_records(plan: PrefillPlan, forward_batch) -> list[dict]:
    """One record per request of a sharded batch."""
    return [
        _record("ring", plan.transport.size, plan.request_rows(i), forward_batch, i, [])
        for i in range(forward_batch.batch_size)
    ]


def stock_records(forward_batch, ranks: int, reason: str) -> list[dict]:
    """One record per request of a batch on SGLang's own path: every rank computed every row."""
    fallbacks = [reason] if reason else []
    return [
        _record("stock", ranks, [forward_batch.extend_seq_lens_cpu[i]] * ranks, forward_batch, i, list(fallbacks))
        for i in range(forward_batch.batch_size)
    ]


def _record(schedule, ranks, rows, forward_batch, request, fallbacks) -> dict:
    return {
        "schedule": schedule,
        "ranks": ranks,
        "rows_per_rank": rows,
        "new_tokens": forward_batch.extend_seq_lens_cpu[request],
        "cached_tokens": forward_batch.extend_prefix_lens_cpu[request],
        "fallbacks": fallbacks,
    }


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
