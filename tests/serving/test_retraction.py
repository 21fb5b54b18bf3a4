"""Answers that are interrupted, and taken up again: pages of all ranks come and go together."""

import os
from unittest import mock

import pytest

from tests.serving import compare
from tests.serving.conftest import asked_at_length
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow
PAGES, PAGE, TOKENS = 44, 66, 128
OFTEN = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}  # SGLang's own: every 40th decode step


@pytest.fixture(scope="module")
def told(checkpoint, prompts) -> dict:
    """The same requests side by side, interrupted again and again, and one after another, where the last one stays."""
    requests = asked_at_length(prompts)
    requests[1] = {"input_ids": requests[0]["input_ids"][::-1]}
    arguments = {"cp": 3, "max_total_tokens": PAGES * PAGE}
    with (
        mock.patch.dict(os.environ, OFTEN),
        engine("tests.serving.observed:ObservedEngine", model_path=checkpoint, **arguments) as ask,
    ):
        together = ask("tests.serving.dialogue:long_answers", requests, TOKENS, 0.0)
        states = ask("rank_states")
        alone = [ask("tests.serving.dialogue:long_answers", [request], TOKENS, 0.0)[0] for request in requests]
    return {"together": together, "alone": alone, "states": states}


def test_interrupted_answers_are_those_of_undisturbed_ones(told):
    prefills = [len([record for record in answer["meta_info"]["sglang_mm"] if record]) for answer in told["together"]]
    assert max(prefills) > 1, "nothing was interrupted"
    for mine, undisturbed in zip(told["together"], told["alone"], strict=True):
        assert len(mine["output_ids"]) == TOKENS
        assert compare.same_answer(mine, undisturbed) <= compare.TOLERANCE


def test_all_pages_are_given_back(told):
    assert len(told["states"]) == 3
    for state in told["states"]:
        assert state["slots"] == PAGES * PAGE
        assert state["free"] + state["cached"] == state["slots"] and state["locked"] == 0
        assert state["free_requests"] == state["requests"]
