"""`python -m sglang_mm.demo`: the main job, run as a user runs it."""

import json
import subprocess
import sys

import pytest

from sglang_mm.demo.__main__ import TOLERANCE, compare, report
from sglang_mm.demo.sides import LEAST_RECALL, Side, compare_sides, kept
from sglang_mm.tiny import write_video

DEMO = [sys.executable, "-m", "sglang_mm.demo"]
KEYS = {
    "cp", "prompt_tokens", "output_tokens", "stock_output_tokens", "hf_output_tokens", "max_logprob_diff",
    "identical", "fallbacks", "rows_per_rank", "ttft_s", "nodes",
}  # fmt: skip
SPARSE_KEYS = {
    "density", "density_by_layer", "recall", "kernels", "seconds", "cached_tokens", "kept", "sparse_output_tokens",
    "sparse_ttft_s", "sparse_in_bounds",
}  # fmt: skip
LARGEST_DENSITY, LARGEST_OF_LAYERS = 0.4, 0.25  # of all layers; of one that is not dense by rule


def test_answers_over_two_ranks_like_the_references_and_sparsely_beside(tmp_path):
    video = write_video(tmp_path / "mine.mp4", seconds=44, seed=3)
    words = ["--cp", "2", "--sparse", "auto", "--video", str(video), "--question", "Which shape is first?", "--json"]
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = json.loads(done.stdout)
    assert told.keys() >= KEYS | SPARSE_KEYS
    assert told["identical"] is True and told["not_sharded"] == [] and told["schedule"] in ("ring", "gather")
    assert told["prompt_tokens"] >= 2000 and len(told["output_tokens"]) == 16
    assert told["output_tokens"] == told["stock_output_tokens"] == told["hf_output_tokens"]
    assert told["max_logprob_diff"] <= TOLERANCE
    assert len(told["rows_per_rank"]) == 2 and min(told["rows_per_rank"]) > 900
    assert told["ttft_s"] > 0 and told["nodes"] == {"": [0, 1]}
    check_sparse(told)


@pytest.mark.slow
def test_answers_over_two_simulated_nodes_like_the_references():
    words = ["--nodes", "2", "--cp", "4", "--json"]
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = json.loads(done.stdout)
    assert told["identical"] is True and told["max_logprob_diff"] <= TOLERANCE
    assert told["nodes"] == {"local-0": [0, 1], "local-1": [2, 3]} and len(told["rows_per_rank"]) == 4
    assert told["sparse_in_bounds"] is True and told["density"] <= LARGEST_DENSITY


def check_sparse(told: dict) -> None:
    """Under `auto`: two dense layers, then six whose heads leave keys out, but for the unstructured one of each."""
    assert told["sparse_in_bounds"] is True and told["cached_tokens"] == {"dense": 0, "sparse": 0}
    first, second, *others = told["density_by_layer"]
    assert first == second == 1.0 and len(others) == 6 and max(others) < LARGEST_OF_LAYERS
    assert told["density"] == pytest.approx(sum(told["density_by_layer"]) / 8, abs=1e-3)
    assert told["density"] <= LARGEST_DENSITY
    assert LEAST_RECALL <= told["recall"] < 1
    assert told["fallbacks"] == {"dense: recall below 0.9": 6}
    assert len(told["sparse_output_tokens"]) == 16 and 0 < told["kept"]["max_logprob_diff"] < float("inf")
    dense, sparse = told["seconds"]["dense"], told["seconds"]["sparse"]
    assert {"index", "compile"} <= sparse.keys() - dense.keys()
    assert {"attention", "total"} <= sparse.keys() & dense.keys()


def test_missing_video_is_refused_at_once():
    done = subprocess.run([*DEMO, "--video", "/nowhere.mp4"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "/nowhere.mp4" in done.stderr and "Remedy" in done.stderr


def side(text="ab", streamed="ab", cached=0, logprob=-1.0, sparse=None) -> Side:
    """A side that answered (5, 6), each with this log-probability."""
    told = {} if sparse is None else {"sparse": sparse}
    record = {"schedule": "ring", "fallbacks": [], "rows_per_rank": [1000, 1000], "cached_tokens": cached, **told}
    record["seconds"] = {"attention": [0.5, 0.7], "total": [1.0, 1.0], "index": [0.2, 0.2] if sparse else [0.0, 0.0]}
    row = [[logprob, 5, None], [-2.0, 1, None], [-2.0, 2, None], [-2.0, 3, None]]
    meta = {"prompt_tokens": 2000, "cached_tokens": 0, "output_top_logprobs": [row, row], "sglang_mm": [record]}
    return Side({"text": streamed, "ttft_s": 0.5}, record, {"output_ids": [5, 6], "text": text, "meta_info": meta})


def outcome(tokens=(5, 6), logprob=-1.0, stock=-1.0, listed="5", text="ab", prompt_tokens=2000) -> dict:
    """compare() of a run that answered (5, 6) with log-probability -1.0 against references that answered this."""
    others = {"1": -2.0, "2": -2.0, "3": -2.0} if listed == "5" else {"7": -2.0}
    reference = {
        "prompt_tokens": prompt_tokens,
        "stock_output_tokens": list(tokens),
        "hf_output_tokens": [5, 6],
        "stock_logprobs": [{listed: stock, **others}] * 2,
        "hf_logprobs": [[0.0, -2.0, -2.0, -2.0, 0.0, logprob]] * 2,
    }
    return compare(2, side(streamed=text), reference)


def sparse_outcome(attended=30, recall=0.95, cached=0, cached_dense=0, logprob=-1.25, sparse=None) -> dict:
    """The same with a sparse side of one layer with 100 causal pairs."""
    layers = [{"attended": attended, "causal": 100, "recall": recall, "tiles": 3}]
    told = {"density": attended / 100, "recall": recall, "layers": layers, "fallbacks": {"why": 2}, "kernels": ["cpu"]}
    other = side(cached=cached, logprob=logprob, sparse=told if sparse is None else sparse)
    return outcome() | compare_sides(side(cached=cached_dense), other)


def test_verdict_when_all_is_equal():
    assert outcome()["identical"] and report(outcome()).endswith("\nidentical")


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": (5, 7)},
        {"logprob": -1.0 - 2 * TOLERANCE},
        {"stock": -1.0 - 2 * TOLERANCE},
        {"listed": "8"},
        {"text": "ax"},
        {"prompt_tokens": 1999},
    ],
)
def test_verdict_when_something_differs(changed):
    assert not outcome(**changed)["identical"] and report(outcome(**changed)).endswith("\nNOT identical")


def test_both_sides_are_told():
    told = sparse_outcome()
    assert told["sparse_in_bounds"] and told["identical"] and told["not_sharded"] == []
    assert (told["density"], told["recall"], told["fallbacks"]) == (0.3, 0.95, {"why": 2})
    assert told["kept"] == {"max_logprob_diff": 0.25, "equal_tokens": 2}
    assert told["seconds"]["dense"] == {"attention": 0.6, "total": 1.0}
    assert told["seconds"]["sparse"] == {"attention": 0.6, "total": 1.0, "index": 0.2}
    shown = report(told)
    assert shown.endswith("\nidentical") and "left dense      2 x why" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("index")] == [["index", "-", "0.200"]]


@pytest.mark.parametrize(
    "changed",
    [
        {"attended": 100},
        {"recall": LEAST_RECALL - 0.01},
        {"cached": 64},
        {"cached_dense": 64},
        {"sparse": {"plan": "auto", "dense": "too few tokens"}},
    ],
)
def test_sparse_verdict_when_something_is_out_of_bounds(changed):
    told = sparse_outcome(**changed)
    assert not told["sparse_in_bounds"] and told["identical"]
    assert "sparse answer NOT within its bounds" in report(told)


def test_why_nothing_was_sparse_is_told():
    told = sparse_outcome(sparse={"plan": "auto", "dense": "too few tokens"})
    assert told["fallbacks"] == {"too few tokens": 1} and "1 x too few tokens" in report(told)


def test_tokens_after_the_first_that_differs_are_not_compared():
    rows = [[[-1.0, 5, None]], [[-1.0, 6, None]], [[-9.0, 7, None]]]
    mine = {"output_ids": [5, 6, 7], "meta_info": {"output_top_logprobs": rows}}
    other = {"output_ids": [5, 8, 7], "meta_info": {"output_top_logprobs": [[[-1.5, 5, None], [-1.0, 6, None]]] * 3}}
    assert kept(other, mine) == {"max_logprob_diff": 0.5, "equal_tokens": 1}
