"""150 mixed requests at once, with aborts, cache hits and evictions: every answer right, everything given back."""

from collections import Counter
from functools import cache

import pytest

from tests.serving import compare
from tests.serving.conftest import KV_TOKENS, SOAK_REQUESTS
from tests.serving.engine_process import engine

GROWTH = 200 << 20  # bytes a rank may hold more after the second half of the load than after the first


@pytest.fixture(scope="module")
def soaked(answers, checkpoint, prompts):
    @cache
    def soaked(cp: int) -> dict:
        if cp <= 2:
            return answers(1, cp, "ring" if cp == 2 else "auto")["soak"]
        arguments = {"cp": cp, "schedule": "auto", "max_total_tokens": KV_TOKENS}
        with engine("tests.serving.observed:ObservedEngine", model_path=checkpoint, **arguments) as ask:
            return ask("tests.serving.soak:run", prompts, SOAK_REQUESTS)

    return soaked


@pytest.mark.parametrize("cp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_mixed_load(soaked, cp):
    mine, single = soaked(cp), soaked(1)["answers"]
    seen = Counter()
    for name, answer in mine["answers"].items():
        ends = [told["meta_info"]["finish_reason"]["type"] for told in (answer, single[name])]
        if "abort" in ends:
            seen["aborted"] += 1
            continue
        assert ends[0] == ends[1], name
        assert compare.same_answer(answer, single[name]) <= compare.TOLERANCE, name
        scores = zip(compare.scores_of(answer), compare.scores_of(single[name]), strict=True)
        assert max((abs(a - b) for a, b in scores), default=0) <= compare.TOLERANCE, name
        record = answer["meta_info"]["sglang_mm"][-1]
        seen["sharded"] += record["schedule"] != "stock"
        seen["in a batch"] += record["batch"] > 1
        seen["cache hits"] += record["cached_tokens"] > 100
        seen["scored"] += bool(compare.scores_of(answer))
    assert seen["aborted"] >= 1 and seen["sharded"] >= 60 and seen["in a batch"] >= 10, seen
    assert seen["cache hits"] >= 20 and seen["scored"] >= 10, seen


@pytest.mark.parametrize("cp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_everything_is_given_back(soaked, cp):
    before, half, after = soaked(cp)["states"]
    assert len(before) == len(after) == cp
    for state in (*before, *half, *after):
        assert state["free"] + state["cached"] == state["slots"] and state["locked"] == 0
        assert state["free_requests"] == state["requests"]
    assert len({(state["free"], state["cached"]) for state in after}) == 1, "all ranks hold the same"
    for earlier, later in zip(half, after):
        assert later["resident_bytes"] - earlier["resident_bytes"] < GROWTH
