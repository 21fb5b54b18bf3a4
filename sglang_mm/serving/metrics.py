"""Prometheus series about records, at SGLang's own /metrics when the server runs with --enable-metrics.

SGLang collects the files of all its processes below PROMETHEUS_MULTIPROC_DIR. prometheus_client looks for that variable
when it is imported, and again for every metric: nothing here is made before SGLang has set it.
"""

import os
from statistics import fmean

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS = tuple(0.01 * 2**i for i in range(20))  # seconds: 10 ms to an hour and a half
RECALLS = (0.5, 0.8, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
DEPENDS_ON_SCHEDULE = ("attention", "transport")  # the stages whose sum is predicted


class Metrics:
    """The series; `observe` adds one record."""

    def __init__(self):
        from prometheus_client import Counter, Histogram

        self.requests = Counter("sglang_mm_requests", "Requests that were prefilled, by schedule.", ["schedule"])
        self.fallbacks = Counter("sglang_mm_fallbacks", "Fallbacks of requests, by reason.", ["reason"])
        self.tokens = Counter(
            "sglang_mm_prompt_tokens",
            "Tokens of prompts, computed (new, by modality) or found in the prefix cache (cached, of any modality).",
            ["modality", "kind"],
        )
        self.sent = Counter(
            "sglang_mm_bytes_sent", "Bytes that the ranks of the first ring sent to each other.", ["kind"]
        )
        self.differing = Counter("sglang_mm_differing_tokens", "Sampled tokens on which replicas had to settle.")
        self.prefill = Histogram(
            "sglang_mm_prefill_seconds", "Seconds of a prefill on its slowest rank.", ["schedule"], buckets=BUCKETS
        )
        self.stages = Counter(
            "sglang_mm_stage_seconds", "Seconds of prefills by stage, as the mean over their ranks.", ["stage"]
        )
        self.pairs = Counter(
            "sglang_mm_pairs", "Pairs of a query and a key of sparse prefills, attended and causal.", ["kind"]
        )
        self.tiles = Counter("sglang_mm_tiles", "Pairs of tiles that sparse kernels met.")
        self.choices = Counter(
            "sglang_mm_sparse_choices", "Choices for rows of a head that became something dearer.", ["reason"]
        )
        self.recall = Histogram("sglang_mm_recall", "Lowest recall of sparse prefills.", buckets=RECALLS)
        self.predicted = Counter(
            "sglang_mm_predicted_seconds", "Predicted seconds of attention and transport.", ["schedule"]
        )
        self.measured = Counter(
            "sglang_mm_measured_seconds", "Measured seconds of what was predicted, on the slowest rank.", ["schedule"]
        )

    def observe(self, record: dict, first: bool) -> None:
        """record: as in meta info. first: it is the request's first prefill."""
        schedule, seconds = record["schedule"], record.get("seconds", {})
        share = 1 / record.get("batch", 1)  # seconds and bytes are those of the whole batch
        if first:
            self.requests.labels(schedule).inc()
        for reason in record.get("fallbacks", ()):
            self.fallbacks.labels(reason).inc()
        for modality, count in (record.get("tokens") or {"any": record.get("new_tokens", 0)}).items():
            self.tokens.labels(modality, "new").inc(count)
        self.tokens.labels("any", "cached").inc(record.get("cached_tokens", 0))
        self.differing.inc(record.get("differing_tokens", 0))
        for kind, sent in record.get("bytes_sent", {}).items():
            self.sent.labels(kind).inc(sum(sent) * share)
        self._observe_sparse(record.get("sparse", {}))
        if total := seconds.get("total"):
            self.prefill.labels(schedule).observe(max(total))
        for stage, each in seconds.items():
            if each and stage != "total":
                self.stages.labels(stage).inc(fmean(each) * share)
        predicted = record.get("predicted_seconds", {}).get(schedule)
        if predicted is not None and (parts := [seconds[name] for name in DEPENDS_ON_SCHEDULE if name in seconds]):
            self.predicted.labels(schedule).inc(predicted * share)
            self.measured.labels(schedule).inc(max(map(sum, zip(*parts))) * share)

    def _observe_sparse(self, sparse: dict) -> None:
        """Of a request that was computed sparsely."""
        if "pairs" not in sparse:
            return
        for kind, count in sparse["pairs"].items():
            self.pairs.labels(kind).inc(count)
        self.tiles.inc(sum(sparse["tiles_per_rank"]))
        for reason, count in sparse["fallbacks"].items():
            self.choices.labels(reason).inc(count)
        self.recall.observe(sparse["recall"])


_metrics: Metrics | None = None


def observe(record: dict, first: bool) -> None:
    """Add a record to the series; nothing where there is nobody to collect them."""
    global _metrics
    if _metrics is None:
        if DIRECTORY not in os.environ:
            return
        _metrics = Metrics()
    _metrics.observe(record, first)
