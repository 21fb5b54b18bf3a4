"""`--kv replicated`: every rank keeps all K/V and decodes with SGLang's own backend."""

import pytest

from tests.serving import cases, compare, sparse_cases
from tests.serving.conftest import KV_TOKENS
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow
NAMES = ["text", "one video", "interleaved", "cached prefix", "second turn", "all input logprobs", "short"]


@pytest.fixture(scope="module", params=[(2, "ring"), (3, "gather")], ids=lambda topology: f"cp{topology[0]}")
def replicated(request, checkpoint, prompts, plan) -> dict:
    cp, schedule = request.param
    arguments = {"cp": cp, "schedule": schedule, "kv": "replicated", "max_total_tokens": KV_TOKENS}
    arguments |= {"sparse": plan, "sparse_min_tokens": sparse_cases.FEWEST}
    with engine("tests.serving.observed:ObservedEngine", model_path=checkpoint, **arguments) as ask:
        ask("keep_prompts")
        told = {"infos": ask("rank_infos"), "cp": cp}
        for case in prompts:
            told[case.name] = ask("generate", **cases.generate_arguments(case))
        for case in cases.follow_ups(prompts):
            if case.name in NAMES:
                told[case.name] = ask("generate", **case.request)
        told |= sparse_cases.ask_all(ask, checkpoint, prompts)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_equals_single_rank(answers, replicated, name):
    mine, single = replicated[name], answers(1, 1)[name]
    assert mine["output_ids"] == single["output_ids"]
    assert compare.largest_difference(mine, single) <= compare.TOLERANCE
    record = compare.record_of(mine)
    assert (record["schedule"] == "stock") == (name == "short")
    if name in ("cached prefix", "second turn"):
        assert record["cached_by"] == "here" and record["frames_encoded"] == [0] * replicated["cp"]


@pytest.mark.parametrize("name", sparse_cases.TURNS)
def test_sparse_turns_equal_single_rank(answers, replicated, name):
    mine, single = replicated[name], answers(1, 1)[name]
    assert mine["output_ids"] == single["output_ids"]
    assert compare.largest_difference(mine, single) <= compare.TOLERANCE
    record = compare.record_of(mine)
    assert record["cached_by"] == ("none" if name == sparse_cases.FIRST else "here")
    assert record["sparse"]["pairs"] == compare.record_of(single)["sparse"]["pairs"]


def test_every_rank_keeps_all(replicated):
    for info in replicated["infos"]:
        sizes = info["sglang_mm"]
        assert sizes["decode_backend"] != "mm_paged"
        assert sizes["kv_bytes"] == (KV_TOKENS + sizes["kv_page"]) * sizes["kv_bytes_per_token"]
