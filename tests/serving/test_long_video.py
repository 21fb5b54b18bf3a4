"""A video of over 32K tokens on a CPU, where SGLang's vision attention would build a mask of 131K x 131K patches."""

import pytest

from sglang_mm.tiny import write_video
from tests.serving import compare
from tests.serving.cases import Case, generate_arguments
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow
PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>How does it end?<|im_end|>\n"


@pytest.fixture(scope="module")
def long_answers(checkpoint, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_video(path, seconds=230)
    case = Case("long video", {"prompt": PROMPT, "video_data": [str(path)]})
    told = {}
    for cp in (1, 2):
        with engine(model_path=checkpoint, cp=cp) as ask:
            told[cp] = ask("generate", **generate_arguments(case))
    return told


def test_two_ranks_equal_one(long_answers):
    record = compare.record_of(long_answers[2])
    assert record["new_tokens"] > 32_000 and record["schedule"] in ("ring", "gather")
    assert max(record["rows_per_rank"]) <= 1.05 * record["new_tokens"] / 2
    assert long_answers[2]["output_ids"] == long_answers[1]["output_ids"]
    assert compare.largest_difference(long_answers[2], long_answers[1]) <= compare.TOLERANCE
