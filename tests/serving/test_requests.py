"""What the server's process tells of a request: once each, whatever SGLang's loop does; log line, totals, metrics."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections import Counter

import pytest

from sglang_mm import Engine  # noqa: F401 (imports SGLang as ours, with our hooks)

from sglang.srt.managers.io_struct import GenerateReqInput  # isort: skip
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager  # isort: skip
from sglang_mm.events import EventHub, Subscriber
from sglang_mm.events.messages import RequestRecord
from sglang_mm.serving import metrics, requests
from sglang_mm.serving.record import KEY

STOCK = {"schedule": "stock", "ranks": 2, "rows_per_rank": [9, 9], "new_tokens": 9, "cached_tokens": 0}
STOCK |= {"fallbacks": ["below --cp-min-tokens"], "differing_tokens": 3}
RING = {
    "schedule": "ring",
    "ranks": 2,
    "rows_per_rank": [15602, 15602],
    "new_tokens": 31204,
    "cached_tokens": 512,
    "cached_by": "queries",
    "chunks": 2,
    "batch": 2,
    "frames_encoded": [4, 4],
    "tokens": {"text": 42, "image": 0, "video": 31162},
    "bytes_sent": {"kv": [2**29, 2**29], "embeddings": [1024, 512], "checks": [0, 0]},
    "seconds": {"vision": [1.0, 2.0], "attention": [3.0, 5.0], "transport": [1.5, 0.5], "total": [7.5, 8.25]},
    "predicted_seconds": {"ring": 5.0, "gather": 6.5},
    "fallbacks": [],
}
COLLECT = """
import json, sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess  # as SGLang's /metrics does
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
OBSERVE = """
import json, sys
from sglang_mm.serving import metrics
assert "prometheus_client" not in sys.modules
for record, first in json.loads(sys.argv[1]):
    metrics.observe(record, first)
print("prometheus_client" in sys.modules)
"""
SPARSE = {**RING, "sparse": {
    "plan": "auto", "kernels": ["reference"], "density": 0.25, "recall": 0.9375, "tiles_per_rank": [3, 4],
    "pairs": {"attended": 25, "causal": 100}, "fallbacks": {"blocks: recall below 0.9": 3},
}}  # fmt: skip
SPARSE_SERIES = {
    f"sglang_mm_{name}" for name in ("pairs_total", "tiles_total", "sparse_choices_total", "recall_count", "recall_sum")
}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """Totals and records of one test alone."""
    monkeypatch.setattr(requests, "_totals", {name: Counter() for name in requests._totals})
    monkeypatch.setattr(requests, "_records", type(requests._records)())


class Requests:
    """SGLang's own accumulation of meta info, behind which our hook runs."""

    def __init__(self, enable_metrics: bool = False):
        self.manager = object.__new__(TokenizerManager)
        self.manager.enable_metrics = enable_metrics

    def state(self, **asked) -> ReqState:
        return ReqState([], False, asyncio.Event(), GenerateReqInput(text="x", **asked), None)

    def output(self, rid: str, state: ReqState, values: list, finish: str | None = None) -> dict:
        """One output of the scheduler: `values` of its new tokens. Returns the meta info."""
        meta_info = {"id": rid, "completion_tokens": 16}
        finish_reason = {"type": finish} if finish else None
        self.manager.update_request_meta_info(meta_info, state, {KEY: [values]}, 0, finish_reason)
        return meta_info


def told(caplog) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == requests.__name__]


@pytest.fixture(autouse=True)
def log(caplog):
    with caplog.at_level(logging.INFO, requests.__name__):
        yield


def test_a_stream_is_counted_and_told_once(caplog):
    asked = Requests()
    state = asked.state(stream=True)
    asked.output("a", state, [RING])
    assert requests.status()["requests"] == {"ring": 1} and told(caplog) == []
    asked.output("a", state, [])
    assert asked.output("a", state, [], "length")[KEY] == [RING]
    status = requests.status()
    assert (status["requests"], status["ends"], status["fallbacks"]) == ({"ring": 1}, {"length": 1}, {})
    assert status["tokens"] == {"new": 31204, "cached": 512, "differing": 0}
    assert status["bytes_sent"] == {"kv": 2**29, "embeddings": 768, "checks": 0}
    assert told(caplog) == [f"{requests.line('a', RING)}; 16 tokens answered, length"]


def test_an_abort_ends_a_request_too(caplog):
    asked = Requests()
    state = asked.state(stream=True)
    asked.output("a", state, [STOCK])
    asked.output("a", state, [None], "abort")
    assert requests.status()["ends"] == {"abort": 1} and told(caplog)[0].endswith("16 tokens answered, abort")
    assert requests.status()["fallbacks"] == {"below --cp-min-tokens": 1}


def test_an_abort_before_the_prefill_has_nothing_to_tell(caplog):
    asked = Requests()
    asked.output("a", asked.state(), [None], "abort")
    assert told(caplog) == [] and requests.status()["ends"] == {} and not requests._records


def test_a_second_prefill_of_a_request_adds_tokens_but_no_request(caplog):
    asked = Requests()
    state = asked.state()
    asked.output("a", state, [STOCK])
    asked.output("a", state, [None, RING], "stop")
    status = requests.status()
    assert status["requests"] == {"stock": 1} and status["tokens"]["new"] == 31204 + 9
    assert requests._records["a"] == RING and len(told(caplog)) == 1


def test_health_checks_are_neither_counted_nor_told(caplog):
    asked = Requests()
    asked.output("HEALTH_CHECK_1", asked.state(log_metrics=False), [STOCK], "length")
    assert told(caplog) == [] and not any(requests.status()[name] for name in ("requests", "ends", "fallbacks"))


def test_what_cannot_be_told_does_not_end_the_loop(caplog):
    asked = Requests()
    asked.output("a", asked.state(), [{"schedule": "ring"}], "stop")
    assert told(caplog) == ["what ran for request 'a' could not be told"]


def test_the_last_records_are_kept(monkeypatch):
    monkeypatch.setattr(requests, "KEPT", 3)
    asked = Requests()
    for rid in "abcde":
        asked.output(rid, asked.state(), [STOCK], "stop")
    assert list(requests._records) == ["c", "d", "e"]


def test_a_line_has_all_of_the_record():
    assert requests.line("a", RING) == (
        "request a: ring on 2 ranks; 31,204 new tokens (text 42, video 31,162), 512 cached (queries travelled); "
        "2 chunks; "
        "in a batch of 2; rows per rank 15,602 15,602; frames encoded per rank 4 4; "
        "prefill 8.250 s (vision 1.500, attention 4.000, transport 1.000); "
        "predicted ring 5.000 s, gather 6.500 s; sent kv 1.0 GiB, embeddings 1.5 KiB"
    )
    assert requests.line("a\n", STOCK) == (
        "request 'a\\n': stock on 2 ranks; 9 new tokens, 0 cached; rows per rank 9 9; fell back: below --cp-min-tokens"
    )
    bare = {"schedule": "stock", "ranks": 16, "new_tokens": 9, "cached_tokens": 0}
    assert requests.line("a", bare) == "request a: stock on 16 ranks; 9 new tokens, 0 cached"
    assert "; sparse by auto on reference: density 0.250, lowest recall 0.938, 3 x blocks: recall below 0.9; " in (
        requests.line("a", SPARSE)
    )
    assert "; dense: few; " in requests.line("a", {**RING, "sparse": {"plan": "auto", "dense": "few"}})
    assert "rows per rank 9 to 11" in requests.line("a", {**bare, "rows_per_rank": [9, 10, *[11] * 14]})


def test_the_end_of_a_request_is_an_event(monkeypatch):
    assert requests.status()["events"] is None
    monkeypatch.setattr(requests, "_hub", None)
    monkeypatch.setattr(requests, "_publisher", requests._publisher)
    with EventHub() as hub, Subscriber(hub.address) as subscriber:
        requests.show(hub)
        assert requests.status()["events"] == hub.address
        asked = Requests()
        asked.output("a", asked.state(), [RING], "stop")
        heard = subscriber.receive(10)
        assert heard == RequestRecord(request="a", record=RING, finish="stop", answer_tokens=16)
        requests._publisher.close()


def observed(records: list, folder: str | None) -> str:
    """Observe records in a process that SGLang would start with `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != metrics.DIRECTORY}
    environment |= {metrics.DIRECTORY: folder} if folder else {}
    return run(OBSERVE, environment, json.dumps(records))


def run(script: str, environment: dict, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def series(folder: str) -> dict[str, float]:
    """What another process collects, as SGLang's /metrics does: `name{labels}` -> value, of our series."""
    lines = run(COLLECT, {**os.environ, metrics.DIRECTORY: folder}).splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#") if name
    }


def test_series_are_what_was_observed(tmp_path):
    folder = str(tmp_path)
    assert observed([(RING, True), (RING, False), (STOCK, True)], folder) == "True\n"
    found = series(folder)
    buckets = {name: found.pop(name) for name in list(found) if "_bucket" in name}
    assert found == {
        'sglang_mm_requests_total{schedule="ring"}': 1,
        'sglang_mm_requests_total{schedule="stock"}': 1,
        'sglang_mm_fallbacks_total{reason="below --cp-min-tokens"}': 1,
        'sglang_mm_prompt_tokens_total{kind="new",modality="text"}': 84,
        'sglang_mm_prompt_tokens_total{kind="new",modality="image"}': 0,
        'sglang_mm_prompt_tokens_total{kind="new",modality="video"}': 62324,
        'sglang_mm_prompt_tokens_total{kind="new",modality="any"}': 9,
        'sglang_mm_prompt_tokens_total{kind="cached",modality="any"}': 1024,
        "sglang_mm_differing_tokens_total": 3,
        'sglang_mm_bytes_sent_total{kind="kv"}': 2**30,  # half of the batch's, twice
        'sglang_mm_bytes_sent_total{kind="embeddings"}': 1536,
        'sglang_mm_bytes_sent_total{kind="checks"}': 0,
        'sglang_mm_prefill_seconds_count{schedule="ring"}': 2,
        'sglang_mm_prefill_seconds_sum{schedule="ring"}': 16.5,
        'sglang_mm_stage_seconds_total{stage="vision"}': 1.5,
        'sglang_mm_stage_seconds_total{stage="attention"}': 4.0,
        'sglang_mm_stage_seconds_total{stage="transport"}': 1.0,
        'sglang_mm_predicted_seconds_total{schedule="ring"}': 5.0,
        'sglang_mm_measured_seconds_total{schedule="ring"}': 5.5,  # half of the slowest rank's 5.0 + 0.5, twice
        "sglang_mm_tiles_total": 0,
        "sglang_mm_recall_count": 0,
        "sglang_mm_recall_sum": 0,
    }
    below = {name: count for name, count in buckets.items() if count == 0}
    assert len(buckets) == len(metrics.BUCKETS) + len(metrics.RECALLS) + 2 and 0 < len(below) < len(buckets)


def test_sparse_series(tmp_path):
    """Two sparse requests, and one that was dense on a sparse server."""
    dense = {**RING, "sparse": {"plan": "auto", "dense": "the request asked for dense attention"}}
    observed([(SPARSE, True), (SPARSE, True), (dense, True)], str(tmp_path))
    found = series(str(tmp_path))
    assert {name: value for name, value in found.items() if name.partition("{")[0] in SPARSE_SERIES} == {
        'sglang_mm_pairs_total{kind="attended"}': 50,
        'sglang_mm_pairs_total{kind="causal"}': 200,
        "sglang_mm_tiles_total": 14,
        'sglang_mm_sparse_choices_total{reason="blocks: recall below 0.9"}': 6,
        "sglang_mm_recall_count": 2,
        "sglang_mm_recall_sum": 1.875,
    }


def test_two_processes_add_up(tmp_path):
    for _ in range(2):
        observed([(STOCK, True)], str(tmp_path))
    assert series(str(tmp_path))['sglang_mm_requests_total{schedule="stock"}'] == 2


def test_without_enable_metrics_nothing_is_made():
    assert observed([(RING, True)], None) == "False\n"


def test_only_a_server_with_metrics_is_observed(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "observe", lambda record, first: seen.append((record["schedule"], first)))
    for enabled in (False, True):
        asked = Requests(enable_metrics=enabled)
        state = asked.state()
        asked.output("a", state, [STOCK])
        asked.output("a", state, [RING], "stop")
    assert seen == [("stock", True), ("ring", False)]
