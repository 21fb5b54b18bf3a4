"""A prompt prefilled in chunks, each sharded, gives the values of one that was not cut, and encodes a video once."""

import pytest

from tests.serving import compare
from tests.serving.cases import SAMPLING, follow_ups, generate_arguments
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow
CHUNK = 256
SCORED = ["input logprobs", "asked tokens"]
NAMES = ["text", "one image", "three images", "one video", "video file", "interleaved"]


@pytest.fixture(scope="module", params=["ring", "gather"])
def chunked(request, checkpoint, prompts) -> dict:
    arguments = {"cp": 2, "chunked_prefill_size": CHUNK, "cp_min_tokens": 8, "schedule": request.param}
    with engine("tests.serving.observed:ObservedEngine", model_path=checkpoint, **arguments) as ask:
        told = {case.name: ask("generate", **generate_arguments(case)) for case in prompts}
        text = prompts[0].request["input_ids"]
        long = {"input_ids": [98, *text * 12], "sampling_params": SAMPLING}
        ask("flush_cache")
        told["aborted"] = ask("tests.serving.dialogue:aborted", long, 0.8)
        ask("flush_cache")
        told |= {case.name: ask("generate", **case.request) for case in follow_ups(prompts) if case.name in SCORED}
    return {**told, "schedule": request.param}


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_chunk(answers, chunked, name):
    record, single = compare.record_of(chunked[name]), answers(1, 1)[name]
    assert record["schedule"] == chunked["schedule"] and record["chunks"] >= record["new_tokens"] // CHUNK > 1
    assert record["new_tokens"] + record["cached_tokens"] == single["meta_info"]["prompt_tokens"]
    assert chunked[name]["output_ids"] == single["output_ids"]
    assert compare.largest_difference(chunked[name], single) <= compare.TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_encoded_once_per_request(answers, chunked, name):
    whole = compare.record_of(answers(1, 2, "ring")[name])["frames_encoded"]
    assert sum(compare.record_of(chunked[name])["frames_encoded"]) == sum(whole)


def test_abort_between_chunks_gives_everything_back(chunked):
    assert chunked["aborted"]["finish_reason"]["type"] == "abort"
    for state in chunked["aborted"]["states"]:
        assert state["free"] + state["cached"] == state["slots"] and state["locked"] == 0
        assert state["free_requests"] == state["requests"]
        assert 0 < state["cached"] < 8400, "it was aborted after its first chunk and before its last"


@pytest.mark.parametrize("name", SCORED)
def test_input_logprobs_over_chunks(answers, chunked, name):
    mine, single = chunked[name], answers(1, 1)[name]
    assert compare.record_of(mine)["chunks"] >= 2
    scores = zip(compare.scores_of(mine), compare.scores_of(single), strict=True)
    assert max(abs(a - b) for a, b in scores) <= compare.TOLERANCE
