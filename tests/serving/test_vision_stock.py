"""`--vision stock` gives the values of SGLang without our corrections, over any number of ranks."""

import pytest

from tests.serving import compare
from tests.serving.cases import generate_arguments
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow  # two engines of its own


@pytest.fixture(scope="module")
def stock_vision(checkpoint, prompts) -> dict:
    case = next(case for case in prompts if case.name == "video file")
    with engine(model_path=checkpoint, cp=2, vision="stock") as ask:
        return ask("generate", **generate_arguments(case))


@pytest.fixture(scope="module")
def unmodified_sglang(checkpoint, prompts) -> dict:
    case = next(case for case in prompts if case.name == "video file")
    with engine("tests.serving.unmodified:engine", model_path=checkpoint) as ask:
        return ask("generate", **generate_arguments(case))


def test_equals_unmodified_sglang(stock_vision, unmodified_sglang):
    assert compare.record_of(stock_vision)["schedule"] in ("ring", "gather")
    assert "sglang_mm" not in unmodified_sglang["meta_info"]
    assert stock_vision["output_ids"] == unmodified_sglang["output_ids"]
    assert compare.largest_difference(stock_vision, unmodified_sglang) <= compare.TOLERANCE


def test_differs_from_the_corrected_values(answers, stock_vision):
    mine, right = compare.rows_of(stock_vision)[0], compare.rows_of(answers(1, 1)["video file"])[0]
    assert max(abs(mine[token] - right[token]) for token in mine.keys() & right.keys()) > 10 * compare.TOLERANCE
