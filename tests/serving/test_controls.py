"""The comparisons of test_values fail when something is wrong: each fault shows in the log-probabilities."""

import os

import pytest

from tests.serving import compare
from tests.serving.broken import FAULT_FILE
from tests.serving.cases import generate_arguments
from tests.serving.conftest import long_prompt, long_question
from tests.serving.engine_process import engine

FAULTS = ["none", "remote piece dropped", "frame swapped", "merge without weights", "resting keys forgotten"]
SETTLED = ["another token drawn", "afterwards"]


@pytest.fixture(scope="module")
def broken_answers(checkpoint, prompts, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("fault") / "fault"
    path.write_text("none")
    os.environ[FAULT_FILE] = str(path)
    (case,) = [case for case in prompts if case.name == "one video"]
    told = {}
    try:
        with engine("tests.serving.broken:BrokenEngine", model_path=checkpoint, cp=2, schedule="ring") as ask:
            for fault in FAULTS + SETTLED:
                path.write_text(fault)
                ask("flush_cache")
                told[fault] = ask("generate", **generate_arguments(case))
            told["long question"] = questions(ask, path, prompts)
    finally:
        del os.environ[FAULT_FILE]
    return told


def questions(ask, path, prompts) -> dict:
    """The question about many cached keys, asked where all ranks know theirs and where one has forgotten them."""
    told = {}
    for fault in ("none", "resting keys forgotten"):
        path.write_text("none")
        ask("flush_cache")
        ask("generate", **generate_arguments(long_prompt(prompts)))
        path.write_text(fault)
        told[fault], _ = ask("generate", **generate_arguments(long_question(prompts)))
    return told


def passes(mine: dict, single: dict) -> bool:
    """What test_values asserts, as a verdict."""
    try:
        return mine["output_ids"] == single["output_ids"] and (
            compare.largest_difference(mine, single) <= compare.TOLERANCE
        )
    except AssertionError:
        return False


@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_notices(answers, broken_answers, fault):
    record = compare.record_of(broken_answers[fault])
    assert record["schedule"] == "ring" and record["cached_tokens"] == 0
    assert passes(broken_answers[fault], answers(1, 1)["one video"]) == (fault == "none")


def test_replicas_settle_on_one_token_and_tell(answers, broken_answers):
    """Rank 1 drew another token each time; the answer is rank 0's, and the next request's record counts them."""
    settled, afterwards = (broken_answers[name] for name in SETTLED)
    single = answers(1, 1)["one video"]
    assert passes(settled, single) and passes(afterwards, single)
    told = [compare.record_of(answer).get("differing_tokens", 0) for answer in (settled, afterwards)]
    assert sum(told) >= len(single["output_ids"]) - 1 and told[1] > 0


def test_keys_forgotten_where_queries_travel_are_noticed(answers, broken_answers):
    single = answers(1, 1)["long question"]
    for fault, mine in broken_answers["long question"].items():
        assert compare.record_of(mine)["cached_by"] == "queries"
        assert passes(mine, single) == (fault == "none")
