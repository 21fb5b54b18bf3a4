"""A prompt prefilled in chunks, each sharded, gives the values of one that was not cut."""

import pytest

from tests.serving import compare
from tests.serving.cases import generate_arguments
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chunked(checkpoint, prompts) -> dict:
    with engine(model_path=checkpoint, cp=2, chunked_prefill_size=300, cp_min_tokens=8) as ask:
        return {case.name: ask("generate", **generate_arguments(case)) for case in prompts}


@pytest.mark.parametrize("name", ["text", "one image", "three images", "one video", "video file"])
def test_equals_one_chunk(answers, chunked, name):
    record = compare.record_of(chunked[name])
    assert record["schedule"] == "ring" and record["cached_tokens"] > 0
    assert chunked[name]["output_ids"] == answers(1, 1)[name]["output_ids"]
    assert compare.largest_difference(chunked[name], answers(1, 1)[name]) <= compare.TOLERANCE
