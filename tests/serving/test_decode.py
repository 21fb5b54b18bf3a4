"""Decoding over sharded K/V: long answers, scored token by token by one rank; and room for longer prompts."""

import pytest

from tests.serving import compare
from tests.serving.conftest import KV_TOKENS, LONG_ANSWER, LONG_PROMPT, asked_at_length, long_prompt
from tests.serving.engine_process import engine

SHARDED = [(1, 2, "ring"), (1, 3, "gather"), (1, 4, "auto")]
CLEAR = 1e-3  # a likeliest token that leads by more is the likeliest everywhere


@pytest.fixture(scope="module")
def single(answers, checkpoint, prompts) -> dict:
    """One rank with as much memory as one of four: how it scores the others' answers, what it says to a long prompt."""
    decoded = {topology: answers(*topology)["long answers"] for topology in SHARDED}
    requests, told = asked_at_length(prompts), {}
    with engine(model_path=checkpoint, max_total_tokens=KV_TOKENS // 4) as ask:
        told["infos"] = ask("rank_infos")
        for topology, mine in decoded.items():
            told[topology] = [
                ask("tests.serving.dialogue:scored_answer", request, answer) for request, answer in zip(requests, mine)
            ]
        with pytest.raises(RuntimeError) as refused:
            ask("generate", **long_prompt(prompts).request, sampling_params={"max_new_tokens": 1})
        told["refused"] = str(refused.value)
    return told


@pytest.mark.parametrize("topology", SHARDED, ids=lambda topology: f"cp{topology[1]}-{topology[2]}")
def test_long_answers_equal_one_rank_under_teacher_forcing(answers, single, topology):
    mine = answers(*topology)["long answers"]
    assert sum(len(answer["output_ids"]) for answer in mine) == LONG_ANSWER * len(mine) >= 256
    for answer, scored in zip(mine, single[topology], strict=True):
        drawn = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
        scores = [value for value, *_ in scored["meta_info"]["input_token_logprobs"]][-LONG_ANSWER:]
        assert max(abs(a - b) for a, b in zip(drawn, scores, strict=True)) <= compare.TOLERANCE
        rows = compare.rows_of(answer), compare.rows_of(scored, "input_top_logprobs")[-LONG_ANSWER:]
        clear = 0
        for likeliest, expected in zip(*rows, strict=True):
            first, second = sorted(expected.values(), reverse=True)
            if first - second > CLEAR:
                clear += 1
                assert max(likeliest, key=likeliest.get) == max(expected, key=expected.get)
        assert clear > 0.9 * LONG_ANSWER


@pytest.mark.parametrize("topology", SHARDED, ids=lambda topology: f"cp{topology[1]}-{topology[2]}")
def test_long_answers_are_decoded_together(answers, topology):
    """In one batch, and over prefixes that were in the cache."""
    mine = answers(*topology)["long answers"]
    assert answers(*topology)["most decoded"] == [len(mine)] * topology[1]
    assert max(answer["meta_info"]["cached_tokens"] for answer in mine) > 500
    assert {compare.record_of(answer)["schedule"] for answer in mine} >= {"stock"}


@pytest.mark.parametrize("topology", SHARDED, ids=lambda topology: f"cp{topology[1]}-{topology[2]}")
def test_queries_travel_to_many_cached_keys_and_few_keys_travel(answers, topology):
    told, single = answers(*topology), answers(1, 1)
    for name in ("long question", "beside it"):
        assert told[name]["output_ids"] == single[name]["output_ids"]
        assert compare.largest_difference(told[name], single[name]) <= compare.TOLERANCE
        record = compare.record_of(told[name])
        assert (record["cached_by"], record["batch"]) == ("queries", 2) and record["schedule"] != "stock"
        assert all(record["bytes_sent"]["queries"])
    assert compare.record_of(told["long question"])["cached_tokens"] > 0.95 * LONG_PROMPT
    assert compare.record_of(told["cached prefix"])["cached_by"] == "keys"
    assert compare.record_of(told["beside it"])["cached_tokens"] < 66


def test_four_ranks_take_a_prompt_that_one_of_the_same_memory_refuses(answers, single):
    four = answers(1, 4, "auto")
    sizes = [info["sglang_mm"]["kv_bytes"] for info in four["infos"]]
    (alone,) = [info["sglang_mm"]["kv_bytes"] for info in single["infos"]]
    page = 64 * single["infos"][0]["sglang_mm"]["kv_bytes_per_token"]
    assert len(sizes) == 4 and all(abs(size - alone) <= page for size in sizes)
    assert f"{LONG_PROMPT:,} tokens" in single["refused"] and f"fewer than {KV_TOKENS // 4 - 6:,}" in single["refused"]
    mine, roomy = four["long prompt"], answers(1, 1)["long prompt"]
    assert mine["meta_info"]["prompt_tokens"] == LONG_PROMPT and mine["output_ids"] == roomy["output_ids"]
    assert compare.largest_difference(mine, roomy) <= compare.TOLERANCE


def test_each_rank_keeps_its_share(answers):
    for topology in SHARDED:
        infos = [info["sglang_mm"] for info in answers(*topology)["infos"]]
        assert {info["decode_backend"] for info in infos} == {"mm_paged"}
        tokens = KV_TOKENS // infos[0]["kv_page"] * infos[0]["kv_page"]
        shared = (tokens + infos[0]["kv_page"]) * infos[0]["kv_bytes_per_token"]
        assert [info["kv_bytes"] for info in infos] == [shared // topology[1]] * topology[1]
