"""Sparse prefill on real SGLang: one plan with every pattern and boundary, each on a head of its own.

One rank equals transformers masked by the oracle, and all rank counts, schedules and ways to cached keys equal one
rank. Sets are chosen from the same numbers, added up in another order: none of these prompts has a tie.
"""

import pytest

from sglang_mm.demo import huggingface
from sglang_mm.patterns.plan_file import load
from sglang_mm.patterns.selection_file import load as load_selections
from sglang_mm.plan.__main__ import main as plan_command
from tests.serving import compare, masked_forward, sparse_cases
from tests.serving.cases import NEW_TOKENS
from tests.serving.masked_forward import Drop
from tests.serving.sparse_cases import AGAIN, FIRST, PAGES, SECOND, SHORT, TEXTS, THIRD, TURNS
from tests.serving.test_values import SHARDED

FEW_TOKENS = "fewer new tokens than --sparse-min-tokens"
WAYS = {FIRST: "none", SECOND: "keys", THIRD: "queries"}  # to cached keys that are sharded


@pytest.fixture(scope="session")
def model(checkpoint):
    return huggingface.load(checkpoint)


@pytest.fixture(scope="session")
def masked(model, answers, plan) -> dict:
    """transformers masked by the oracle; what follows the first turn, over the keys and values that it left."""
    shown, chosen = answers(1, 1)["sparse prompts"], load(plan)
    told = {FIRST: masked_forward.answer(model, shown[FIRST], chosen, NEW_TOKENS)}
    for name in (SECOND, THIRD):
        told[name] = masked_forward.answer(model, shown[name], chosen, NEW_TOKENS, cached=told[FIRST], prefix=PAGES)
    return told


@pytest.mark.parametrize("name", TURNS)
def test_one_rank_equals_the_oracle(answers, masked, name):
    mine, reference = answers(1, 1)[name], masked[name]
    assert compare.difference_to_huggingface(mine, reference.tokens, reference.logprobs) <= compare.TOLERANCE


@pytest.mark.parametrize("number", range(2))
def test_texts_of_a_batch_equal_the_oracle(answers, model, plan, prompts, number):
    mine = answers(1, 1)[TEXTS][number]
    prompt = huggingface.text_prompt(sparse_cases.texts(prompts)["input_ids"][number])
    reference = masked_forward.answer(model, prompt, load(plan), NEW_TOKENS)
    assert compare.difference_to_huggingface(mine, reference.tokens, reference.logprobs) <= compare.TOLERANCE


def test_control_a_dropped_set_is_noticed(answers, model, plan):
    """One class of one head, and nothing else, is missing from the reference's mask."""
    answer, prompt = answers(1, 1)[FIRST], answers(1, 1)["sparse prompts"][FIRST]
    wrong = masked_forward.answer(model, prompt, load(plan), NEW_TOKENS, drop=Drop(layer=0, unit=0))
    try:
        difference = compare.difference_to_huggingface(answer, wrong.tokens, wrong.logprobs)
    except AssertionError:  # other tokens
        return
    assert difference > 2 * compare.TOLERANCE


def test_it_is_sparse(answers, plan):
    """Far fewer pairs than causal attention; the answer differs from the dense one by more than rounding."""
    mine, dense = answers(1, 1)[FIRST], answers(1, 1)[AGAIN]
    told = compare.record_of(mine)["sparse"]
    assert (told["plan"], told["kernel_backend"]) == (f"every.json {load(plan).digest()}", "auto")
    assert told["kernels"] == ["cpu"] and not told["kernels_passed_over"]
    layers, tokens = told["layers"], mine["meta_info"]["prompt_tokens"]
    assert all(layer["causal"] == 8 * tokens * (tokens + 1) // 2 for layer in layers)
    assert all(layer["index_s"] > 0 and layer["compile_s"] > 0 for layer in layers)
    assert all(0.1 < layer["attended"] / layer["causal"] < 0.8 for layer in layers)
    assert told["density"] == sum(layer["attended"] for layer in layers) / sum(layer["causal"] for layer in layers)
    assert all(layer["tiles"] * 128 * 128 > 0 and load(plan).theta <= layer["recall"] < 1 for layer in layers)
    difference = max(
        abs(a[token] - b[token])
        for a, b in zip(compare.rows_of(mine)[:1], compare.rows_of(dense)[:1])
        for token in a.keys() & b.keys()
    )
    assert difference > 10 * compare.TOLERANCE


def test_dense_requests_are_dense_and_share_no_keys_with_sparse_ones(answers):
    """The first turn again, its sparse K/V being cached: nothing of them is used."""
    record = compare.record_of(answers(1, 1)[AGAIN])
    assert record["cached_tokens"] == 0 and record["schedule"] == "stock"
    assert record["sparse"]["dense"] == "the request asked for dense attention"


def test_few_new_tokens_are_dense(answers):
    record = compare.record_of(answers(1, 1)[SHORT])
    assert record["schedule"] == "stock" and record["sparse"]["dense"] == FEW_TOKENS


def test_selections_are_kept(answers, kept, masked, tmp_path, capsys):
    """As the reference found them, which selected for itself."""
    request = answers(1, 1)[SECOND]["meta_info"]["id"]
    path = f"{kept(1)}/{request}.npz"
    found = load_selections(path)
    assert [len(layers) for layers in found.layers] == [2]
    for layer, (selection, report) in zip(found.layers[0], masked[SECOND].chunks[0], strict=True):
        assert layer.selection.digest() == selection.digest()
        assert [verdict.kept for verdict in layer.verdicts] == [verdict.kept for verdict in report.verdicts]
    assert plan_command(["show", "--from-request", path]) == 0 and request in capsys.readouterr().out
    drawn = ["--layer", "1", "--head", "0", "--out", str(tmp_path / "drawn.png")]
    assert (
        plan_command(["draw", "--from-request", path, *drawn]) == 0 and (tmp_path / "drawn.png").stat().st_size > 9999
    )


@pytest.mark.parametrize("topology", SHARDED, ids=lambda t: f"tp{t[0]}-cp{t[1]}-{t[2]}")
class TestSharded:
    @pytest.mark.parametrize("name", [*TURNS, SHORT, AGAIN])
    def test_equals_one_rank(self, answers, topology, name):
        mine, single = answers(*topology)[name], answers(1, 1)[name]
        assert mine["output_ids"] == single["output_ids"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE

    @pytest.mark.parametrize("number", range(2))
    def test_texts_equal_one_rank(self, answers, topology, number):
        mine, single = answers(*topology)[TEXTS][number], answers(1, 1)[TEXTS][number]
        assert mine["output_ids"] == single["output_ids"]
        assert compare.largest_difference(mine, single) <= compare.TOLERANCE

    @pytest.mark.parametrize("name", TURNS)
    def test_record(self, answers, topology, name):
        mine, single = compare.record_of(answers(*topology)[name]), compare.record_of(answers(1, 1)[name])
        told, alone = mine["sparse"], single["sparse"]
        assert mine["cached_by"] == WAYS[name] and single["cached_by"] == ("none" if name == FIRST else "here")
        assert len(told["tiles_per_rank"]) == topology[1] and sum(told["tiles_per_rank"]) > 0
        assert sum(told["tiles_per_rank"]) == sum(layer["tiles"] for layer in told["layers"])
        assert all(sum(mine["seconds"][stage]) > 0 for stage in ("index", "compile", "attention"))
        assert sum(mine["bytes_sent"]["selection"]) > 0 and not mine["fallbacks"]
        assert mine["cached_tokens"] == single["cached_tokens"] == (0 if name == FIRST else PAGES)
        assert told["pairs"] == alone["pairs"] and told["fallbacks"] == alone["fallbacks"]
        assert told["recall"] == pytest.approx(alone["recall"], abs=1e-4)

    def test_dense_requests_share_no_keys_with_sparse_ones(self, answers, topology):
        record = compare.record_of(answers(*topology)[AGAIN])
        assert record["cached_tokens"] == 0 and record["sparse"]["dense"] == "the request asked for dense attention"

    def test_few_new_tokens_are_dense(self, answers, topology):
        record = compare.record_of(answers(*topology)[SHORT])
        assert record["sparse"]["dense"] == FEW_TOKENS
