"""The paired measurement on a short prompt: what it writes agrees with itself and with counts made here."""

import json

import pytest
import torch

from benchmarks.sparse_prefill import DIM, HEADS, STAGES, dense, describe, draw, main
from sglang_mm.plan.geometry import parse_geometry

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 2048


def test_what_is_written_agrees_with_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparse_prefill", "--tokens", str(TOKENS), "--pairs", "1", "--out", str(tmp_path)])
    main()
    told = json.loads((tmp_path / "sparse-prefill.json").read_text())
    assert told["tokens"] == TOKENS and told["threads"] == 1 and told["device"] == "cpu"
    for heads in ("structured", "unstructured"):
        check(told[heads])
    structured, noise = told["structured"], told["unstructured"]
    assert all(head["sparse"] for head in structured["by_head"]) and structured["relative_error"] < 0.1
    assert not any(head["sparse"] for head in noise["by_head"]) and noise["attended_pairs"] == noise["causal_pairs"]
    assert sum(noise["fallbacks"].values()) == 2 * HEADS and noise["relative_error"] < 1e-5
    text = (tmp_path / "sparse-prefill.md").read_text()
    assert f"{structured['attended_pairs']:,}" in text and f"load {told['load_before']:.1f} before" in text


def check(found: dict) -> None:
    seconds = found["seconds"]
    for each in (*seconds.values(), found["dense_over_sparse"]):
        assert len(each["runs"]) == found["pairs"] and each["min"] <= each["median"] <= each["max"]
    assert 0 < sum(seconds[stage]["median"] for stage in STAGES) <= seconds["sparse"]["median"]
    ran = STAGES if any(head["sparse"] for head in found["by_head"]) else ("index", "attention")
    assert [stage for stage in STAGES if seconds[stage]["min"] > 0] == list(ran)
    assert found["causal_pairs"] == HEADS * TOKENS * (TOKENS + 1) // 2
    assert sum(head["attended_pairs"] for head in found["by_head"]) == found["attended_pairs"] <= found["causal_pairs"]
    assert all(0.9 - 1e-4 <= head["recall"] <= 1 + 1e-4 for head in found["by_head"])


def test_dense_is_causal_attention():
    qkv = draw(parse_geometry(describe(400)), structured=True)
    q, k, v = (each.double() for each in qkv)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4, 1)) * DIM**-0.5
    weights = scores.masked_fill(~torch.ones(400, 400).tril().bool(), float("-inf")).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(4, 1))
    assert float((dense(qkv) - want).abs().max()) < 1e-4


def test_prompts_have_the_size_asked_for():
    assert [len(parse_geometry(describe(tokens))) for tokens in (384, 2047, 32768)] == [384, 2047, 32768]
    with pytest.raises(SystemExit, match="--tokens 383: pass 384 or more"):
        describe(383)
