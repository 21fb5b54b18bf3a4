"""Other plans and kernels on real SGLang, each with an engine of its own: dense patterns, no plan, Triton."""

import pytest

from sglang_mm.demo import huggingface
from sglang_mm.patterns.plan_file import load, read_model, save
from sglang_mm.tiny import write_checkpoint
from tests.serving import compare, masked_forward, plans, sparse_cases
from tests.serving.cases import NEW_TOKENS, SAMPLING, TOP
from tests.serving.engine_process import engine
from tests.serving.sparse_cases import AGAIN, FEWEST, FIRST, dialogue

SCORED = {"sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": TOP}
KV_TOKENS = 8000
CHUNK = 704  # a third of the first turn, in whole pages


def test_a_plan_of_dense_patterns_gives_the_dense_values(answers, checkpoint, tmp_path):
    plan = save(plans.all_dense(read_model(checkpoint)), tmp_path / "dense.json")
    asked = {"cp": 2, "sparse": str(plan), "sparse_min_tokens": FEWEST, "max_total_tokens": KV_TOKENS}
    with engine(model_path=checkpoint, **asked) as ask:
        mine = ask("generate", **dialogue(checkpoint)[FIRST], **SCORED)
    told, dense = compare.record_of(mine)["sparse"], answers(1, 1)[AGAIN]
    assert told["density"] == told["recall"] == 1 and not told["fallbacks"]
    assert mine["output_ids"] == dense["output_ids"]
    assert compare.largest_difference(mine, dense) <= compare.TOLERANCE


def test_heads_without_structure_fall_back_and_say_so(tmp_path):
    """No plan, and attention that is random too: whatever keeps enough would compute next to everything."""
    checkpoint = str(write_checkpoint(tmp_path / "random", planted=False, layers=3))
    asked = {"sparse": "auto", "sparse_min_tokens": FEWEST, "max_total_tokens": KV_TOKENS}
    with engine(model_path=checkpoint, **asked) as ask:
        ask("keep_prompts")
        mine = ask("generate", **dialogue(checkpoint)[FIRST], **SCORED)
        (shown,) = ask("kept_prompts")
    told = compare.record_of(mine)["sparse"]
    assert [layer["attended"] == layer["causal"] for layer in told["layers"]] == [True, True, True]
    assert told["density"] == told["recall"] == 1 and sum(told["fallbacks"].values()) >= 8
    assert all(reason.startswith("dense: ") for reason in told["fallbacks"])
    tokens, logprobs = huggingface.greedy(huggingface.load(checkpoint), shown, NEW_TOKENS)
    assert compare.difference_to_huggingface(mine, tokens, logprobs) <= compare.TOLERANCE


def test_triton_in_its_interpreter(checkpoint, plan, prompts, monkeypatch):
    """Two ranks, a prompt of a few tiles: the kernels' own arithmetic against the oracle."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ids = sparse_cases.texts(prompts)["input_ids"][1]
    asked = {"cp": 2, "sparse": plan, "kernel_backend": "triton", "sparse_min_tokens": FEWEST}
    with engine(model_path=checkpoint, schedule="ring", max_total_tokens=KV_TOKENS, **asked) as ask:
        mine = ask("generate", input_ids=ids, **SCORED)
    told = compare.record_of(mine)["sparse"]
    assert told["kernels"] == ["triton"] and not told["kernels_passed_over"] and told["density"] < 1
    reference = masked_forward.answer(
        huggingface.load(checkpoint), huggingface.text_prompt(ids), load(plan), NEW_TOKENS
    )
    assert compare.difference_to_huggingface(mine, reference.tokens, reference.logprobs) <= compare.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_chunks_select_for_themselves(checkpoint, plan, schedule):
    """Each chunk by its own last rows and what the chunks before it found of classes, as the oracle does it."""
    asked = {"cp": 2, "sparse": plan, "sparse_min_tokens": FEWEST, "schedule": schedule}
    with engine(model_path=checkpoint, chunked_prefill_size=CHUNK, max_total_tokens=KV_TOKENS, **asked) as ask:
        ask("keep_prompts")
        mine = ask("generate", **dialogue(checkpoint)[FIRST], **SCORED)
        (shown,) = ask("kept_prompts")
    record, stops = compare.record_of(mine), range(CHUNK, len(shown.input_ids), CHUNK)
    assert record["chunks"] == len(stops) + 1 == 3 and record["sparse"]["density"] < 1
    assert record["sparse"]["recall"] >= load(plan).theta
    reference = masked_forward.answer(huggingface.load(checkpoint), shown, load(plan), NEW_TOKENS, stops=stops)
    assert compare.difference_to_huggingface(mine, reference.tokens, reference.logprobs) <= compare.TOLERANCE
