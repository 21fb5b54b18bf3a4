"""`python -m sglang_mm.demo`: the main job, run as a user runs it."""

import json
import subprocess
import sys

import pytest

from sglang_mm.demo.__main__ import TOLERANCE, compare, report
from sglang_mm.tiny import write_video

DEMO = [sys.executable, "-m", "sglang_mm.demo"]
KEYS = {
    "cp", "prompt_tokens", "output_tokens", "stock_output_tokens", "hf_output_tokens", "max_logprob_diff",
    "identical", "fallbacks", "rows_per_rank", "ttft_s",
}  # fmt: skip


def test_answers_over_two_ranks_like_the_references(tmp_path):
    video = write_video(tmp_path / "mine.mp4", seconds=20, seed=3)
    words = ["--cp", "2", "--video", str(video), "--question", "Which shape is first?", "--json"]
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told.keys() >= KEYS
    assert told["identical"] is True and told["fallbacks"] == [] and told["schedule"] in ("ring", "gather")
    assert told["prompt_tokens"] >= 2000 and len(told["output_tokens"]) == 16
    assert told["output_tokens"] == told["stock_output_tokens"] == told["hf_output_tokens"]
    assert told["max_logprob_diff"] <= TOLERANCE
    assert len(told["rows_per_rank"]) == 2 and min(told["rows_per_rank"]) > 900
    assert told["ttft_s"] > 0


def test_missing_video_is_refused_at_once():
    done = subprocess.run([*DEMO, "--video", "/nowhere.mp4"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "/nowhere.mp4" in done.stderr and "Remedy" in done.stderr


def outcome(tokens=(5, 6), logprob=-1.0, stock=-1.0, listed="5", text="ab", prompt_tokens=2000) -> dict:
    """compare() of a run that answered (5, 6) with log-probability -1.0 against references that answered this."""
    record = {"schedule": "ring", "fallbacks": [], "rows_per_rank": [1000, 1000]}
    row = [[-1.0, 5, None], [-2.0, 1, None], [-2.0, 2, None], [-2.0, 3, None]]
    others = {"1": -2.0, "2": -2.0, "3": -2.0} if listed == "5" else {"7": -2.0}
    meta = {"prompt_tokens": 2000, "output_top_logprobs": [row, row], "sglang_mm": [record]}
    mine = {"output_ids": [5, 6], "text": "ab", "meta_info": meta}
    reference = {
        "prompt_tokens": prompt_tokens,
        "stock_output_tokens": list(tokens),
        "hf_output_tokens": [5, 6],
        "stock_logprobs": [{listed: stock, **others}] * 2,
        "hf_logprobs": [[0.0, -2.0, -2.0, -2.0, 0.0, logprob]] * 2,
    }
    return compare(2, {"text": text, "ttft_s": 0.5}, record, mine, reference)


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
