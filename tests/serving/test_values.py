"""The values of C ranks are those of one rank, and those of transformers."""

import json
import re

import pytest

from sglang_mm.demo import huggingface
from tests.serving import compare
from tests.serving.cases import NEW_TOKENS

NAMES = ["text", "one image", "three images", "one video", "video file", "interleaved"]
FURTHER = [
    "cached prefix", "second turn", "input logprobs", "all input logprobs", "asked tokens", "stop string", "stop token",
    "regex", "json schema",
]  # fmt: skip
PAGE = 66  # hits end with a page, of 64 tokens or, for three ranks, 66
SLOW = [(1, 2, "gather"), (1, 4, "gather"), (2, 2, "auto")]
SHARDED = [
    (1, 2, "ring"), (1, 3, "gather"), (1, 4, "auto"), *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW)
]  # fmt: skip


@pytest.fixture(scope="session")
def huggingface_answers(answers, checkpoint, prompts) -> dict:
    """transformers on the very ids, pixels and positions that single-rank SGLang used."""
    kept = answers(1, 1)["prompts"]
    model = huggingface.load(checkpoint)
    told = {}
    for case in prompts:
        prompt = kept.get(case.name) or huggingface.text_prompt(case.request["input_ids"])
        told[case.name] = huggingface.greedy(model, prompt, NEW_TOKENS)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_single_rank_equals_huggingface(answers, huggingface_answers, name):
    assert compare.difference_to_huggingface(answers(1, 1)[name], *huggingface_answers[name]) <= compare.TOLERANCE


@pytest.mark.parametrize("topology", SHARDED, ids=lambda t: f"tp{t[0]}-cp{t[1]}-{t[2]}")
class TestSharded:
    @pytest.mark.parametrize("name", NAMES)
    def test_equals_single_rank_and_huggingface(self, answers, huggingface_answers, topology, name):
        mine, single = answers(*topology)[name], answers(1, 1)[name]
        assert mine["output_ids"] == single["output_ids"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE
        assert compare.difference_to_huggingface(mine, *huggingface_answers[name]) <= compare.TOLERANCE

    @pytest.mark.parametrize("name", NAMES)
    def test_every_rank_took_its_share(self, answers, topology, name):
        _, cp, schedule = topology
        record = compare.record_of(answers(*topology)[name])
        tokens = answers(*topology)[name]["meta_info"]["prompt_tokens"]
        assert record["schedule"] in (("ring", "gather") if schedule == "auto" else (schedule,))
        assert record["fallbacks"] == [] and record["ranks"] == cp == len(record["rows_per_rank"])
        assert sum(record["rows_per_rank"]) == record["new_tokens"] == tokens - record["cached_tokens"] > 512
        assert max(record["rows_per_rank"]) <= 1.05 * record["new_tokens"] / cp

    @pytest.mark.parametrize("name", NAMES)
    def test_record_tells_what_each_rank_did(self, answers, topology, name):
        _, cp, schedule = topology
        told = answers(*topology)
        record = compare.record_of(told[name])
        assert sum(record["tokens"].values()) == record["new_tokens"]
        frames = _frames(told["prompts"].get(name))
        assert sum(record["frames_encoded"]) == frames and (frames > 0) == any(record["seconds"]["vision"])
        per_row = told["infos"][0]["sglang_mm"]["kv_bytes_per_token"]
        # every rank's rows travel to all others, in every layer
        assert sum(record["bytes_sent"]["kv"]) == record["new_tokens"] * per_row * (cp - 1)
        seconds = record["seconds"]
        for rank in range(cp):
            stages = [seconds[stage][rank] for stage in ("vision", "exchange", "attention", "transport", "rest")]
            assert seconds["attention"][rank] > 0 and abs(sum(stages) - seconds["total"][rank]) < 1e-4
            assert seconds["total"][rank] < told[name]["meta_info"]["e2e_latency"]
        assert set(record["predicted_seconds"]) == ({"ring", "gather"} if schedule == "auto" else set())

    @pytest.mark.parametrize("name", FURTHER)
    def test_further_requests_equal_single_rank(self, answers, topology, name):
        mine, single = answers(*topology)[name], answers(1, 1)[name]
        assert mine["output_ids"] == single["output_ids"] and mine["text"] == single["text"]
        assert mine["meta_info"]["finish_reason"] == single["meta_info"]["finish_reason"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE
        scores = [compare.scores_of(answer) for answer in (mine, single)]
        assert len(scores[0]) == len(scores[1]) and (len(scores[0]) > 500) == ("logprobs" in name or "asked" in name)
        assert max((abs(a - b) for a, b in zip(*scores)), default=0) <= compare.TOLERANCE

    @pytest.mark.parametrize(("name", "cached"), [("cached prefix", 900), ("second turn", 1700)])
    def test_cached_prefix_is_attended(self, answers, topology, name, cached):
        record = compare.record_of(answers(*topology)[name])
        assert record["schedule"] != "stock" and record["cached_tokens"] > cached and record["new_tokens"] > 512
        assert sum(record["frames_encoded"]) <= 1, "of a cached video only a frame that a page's end cuts"

    @pytest.mark.parametrize("name", ["input logprobs", "all input logprobs", "asked tokens"])
    def test_scored_prompts_are_sharded(self, answers, topology, name):
        record = compare.record_of(answers(*topology)[name])
        assert record["schedule"] != "stock" and sum(record["rows_per_rank"]) == record["new_tokens"] > 512

    def test_answers_end_where_they_were_told_to(self, answers, topology):
        told = answers(*topology)
        for name in ("stop string", "stop token", "regex", "json schema"):
            assert told[name]["meta_info"]["finish_reason"]["type"] == "stop"
        assert re.fullmatch("[0-9]{3}-[a-f]{2}", told["regex"]["text"])
        assert type(json.loads(told["json schema"]["text"])["n"]) is int

    @pytest.mark.parametrize("name", ["batch", "two answers"])
    def test_several_at_once(self, answers, topology, name):
        for mine, single in zip(answers(*topology)[name], answers(1, 1)[name], strict=True):
            assert mine["output_ids"] == single["output_ids"]
            assert compare.largest_difference(mine, single) <= compare.TOLERANCE
        # the short one is sharded only because it shares its batch with the long one
        records = [compare.record_of(answer) for answer in answers(*topology)["batch"]]
        assert all(record["schedule"] != "stock" and record["batch"] == 2 for record in records)

    def test_streaming(self, answers, topology):
        mine, single = answers(*topology)["streamed"], answers(1, 1)["streamed"]
        assert len(mine["pieces"]) > 1 and mine["output_ids"] == single["output_ids"]
        assert compare.record_of(mine)["schedule"] != "stock"

    def test_all_ranks_draw_the_same_tokens(self, answers, topology):
        """Drawn tokens are scored alike by prefill, and a later prompt finds them in the cache of every rank."""
        told = answers(*topology)["sampled"]
        pairs = zip(told["drawn"], told["scored"], strict=True)
        assert len(told["drawn"]) == NEW_TOKENS and max(abs(a - b) for a, b in pairs) <= compare.TOLERANCE
        assert compare.record_of(told["asked"])["cached_tokens"] > 700 + NEW_TOKENS - 1 - PAGE

    def test_abort_gives_everything_back(self, answers, topology):
        told = answers(*topology)["aborted"]
        assert told["finish_reason"]["type"] == "abort"
        assert len(told["states"]) == topology[0] * topology[1]
        for state in told["states"]:
            assert state["free"] + state["cached"] == state["slots"] and state["locked"] == 0
            assert state["free_requests"] == state["requests"]

    def test_short_request_takes_the_stock_path_and_says_so(self, answers, topology):
        mine = answers(*topology)["short"]
        record = compare.record_of(mine)
        assert record["schedule"] == "stock" and record["fallbacks"] == ["below --cp-min-tokens"]
        assert compare.largest_difference(mine, answers(1, 1)["short"]) <= compare.TOLERANCE

    def test_heads_and_bytes_are_those_of_one_rank(self, answers, topology):
        tp, cp, _ = topology
        (single,), ranks = answers(1, 1)["infos"], answers(*topology)["infos"]
        assert len(ranks) == tp * cp
        heads = single["sglang_mm"]["q_heads"] // tp
        assert sorted(rank["sglang_mm"]["first_q_head"] for rank in ranks) == sorted(
            [*range(0, heads * tp, heads)] * cp
        )
        for rank in ranks:
            assert rank["sglang_mm"]["kv_heads"] * tp == single["sglang_mm"]["kv_heads"] == 2
            assert rank["sglang_mm"]["q_heads"] * tp == single["sglang_mm"]["q_heads"]
            assert rank["sglang_mm"]["kv_bytes_per_token"] * tp == single["sglang_mm"]["kv_bytes_per_token"]
            assert rank["sglang_mm"]["prefill_backend"] == "mm_ring"


def _frames(prompt) -> int:
    """Images and pairs of video frames of a prompt, None for a text."""
    grids = [grid for name, grid in prompt.media.items() if name.endswith("grid_thw")] if prompt else []
    return sum(int(grid[:, 0].sum()) for grid in grids)
