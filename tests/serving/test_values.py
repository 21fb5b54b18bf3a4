"""The values of C ranks are those of one rank, and those of transformers."""

import pytest

from sglang_mm.demo import huggingface
from tests.serving import compare
from tests.serving.cases import NEW_TOKENS

NAMES = ["text", "one image", "three images", "one video", "video file"]
SHARDED = [(1, 2), (1, 3), (1, 4), pytest.param((2, 2), marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def huggingface_answers(answers, checkpoint, prompts) -> dict:
    """transformers on the very ids, pixels and positions that single-rank SGLang used."""
    kept = iter(answers(1, 1)["prompts"])
    model = huggingface.load(checkpoint)
    told = {}
    for case in prompts:
        has_media = {"image_data", "video_data"} & case.request.keys()
        prompt = next(kept) if has_media else huggingface.text_prompt(case.request["input_ids"])
        told[case.name] = huggingface.greedy(model, prompt, NEW_TOKENS)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_single_rank_equals_huggingface(answers, huggingface_answers, name):
    assert compare.difference_to_huggingface(answers(1, 1)[name], *huggingface_answers[name]) <= compare.TOLERANCE


@pytest.mark.parametrize("topology", SHARDED, ids=lambda t: f"tp{t[0]}-cp{t[1]}")
class TestSharded:
    @pytest.mark.parametrize("name", NAMES)
    def test_equals_single_rank_and_huggingface(self, answers, huggingface_answers, topology, name):
        mine, single = answers(*topology)[name], answers(1, 1)[name]
        assert mine["output_ids"] == single["output_ids"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE
        assert compare.difference_to_huggingface(mine, *huggingface_answers[name]) <= compare.TOLERANCE

    @pytest.mark.parametrize("name", NAMES)
    def test_ring_ran_on_every_rank(self, answers, topology, name):
        record = compare.record_of(answers(*topology)[name])
        tokens = answers(*topology)[name]["meta_info"]["prompt_tokens"]
        assert record["schedule"] == "ring" and record["fallbacks"] == []
        assert record["ranks"] == topology[1] == len(record["rows_per_rank"])
        assert sum(record["rows_per_rank"]) == record["new_tokens"] == tokens - record["cached_tokens"] > 512
        assert max(record["rows_per_rank"]) <= 1.05 * record["new_tokens"] / topology[1]

    def test_cached_prefix_is_attended(self, answers, topology):
        mine, single = answers(*topology)["cached prefix"], answers(1, 1)["cached prefix"]
        record = compare.record_of(mine)
        assert record["schedule"] == "ring" and record["cached_tokens"] > 900
        assert mine["output_ids"] == single["output_ids"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE

    def test_batch_of_a_long_and_a_short_request(self, answers, topology):
        for mine, single in zip(answers(*topology)["batch"], answers(1, 1)["batch"], strict=True):
            # the short one is sharded only because it shares its batch with the long one
            assert compare.record_of(mine)["schedule"] == "ring"
            assert mine["output_ids"] == single["output_ids"]
            assert compare.largest_difference(mine, single) <= compare.TOLERANCE

    def test_input_logprobs(self, answers, topology):
        mine, single = answers(*topology)["input logprobs"], answers(1, 1)["input logprobs"]
        assert compare.record_of(mine)["schedule"] == "ring"
        assert len(mine["meta_info"]["input_top_logprobs"]) == len(single["meta_info"]["input_top_logprobs"]) > 500
        assert compare.largest_difference(mine, single, "input_top_logprobs") <= compare.TOLERANCE
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE

    def test_short_request_takes_the_stock_path_and_says_so(self, answers, topology):
        mine = answers(*topology)["short"]
        record = compare.record_of(mine)
        assert record["schedule"] == "stock" and record["fallbacks"] == ["below --cp-min-tokens"]
        assert compare.largest_difference(mine, answers(1, 1)["short"]) <= compare.TOLERANCE

    def test_heads_and_bytes_are_those_of_one_rank(self, answers, topology):
        tp, cp = topology
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
