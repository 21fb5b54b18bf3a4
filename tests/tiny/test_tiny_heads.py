"""Every planted head holds its pattern in every layer, and nothing else does."""

import pytest
import torch

from sglang_mm.tiny import planted_heads, write_checkpoint
from sglang_mm.tiny.planted import PATTERNS
from sglang_mm.tiny.tokenizer import SPECIAL_IDS
from tests.tiny.conftest import load
from tests.tiny.prompts import forward, video_prompt

STRUCTURED = [name for name in PATTERNS if name != "unstructured"]
COLUMN_TOKENS = torch.tensor([ord("#"), SPECIAL_IDS["<|vision_start|>"]])


@pytest.fixture(scope="module")
def text_prompt(planted, frames):
    """A thousand tokens of text around a video of 8 tokens, for the pattern that covers all of the video."""
    return video_prompt(planted.processor, frames[:4, :56, :56], before="An old story. " * 70)


@pytest.fixture(scope="module")
def attentions(planted, random, prompt, text_prompt):
    """attention fp32 [layers, heads, S, S] by checkpoint and prompt."""

    def attend(model, prompt):
        return torch.cat(forward(model, prompt, attentions=True).attentions)

    return {
        ("planted", "video"): attend(planted.eager, prompt),
        ("planted", "text"): attend(planted.eager, text_prompt),
        ("random", "video"): attend(random.eager, prompt),
        ("random", "text"): attend(random.eager, text_prompt),
    }


def pattern(prompt, name: str) -> torch.Tensor:
    """bool [S, S]: what a row of the pattern attends to, as the table in planted.py says it."""
    t, h, w = prompt.positions
    video, first = prompt.is_video, torch.arange(len(prompt.ids)) == 0
    media_pairs = video[:, None] & video

    def same(axis):
        return axis[:, None] == axis

    columns = {"sink": first, "vertical": torch.isin(prompt.ids, COLUMN_TOKENS), "text": ~video, "text_to_video": video}
    masks = {
        "grid": media_pairs & same(h) & same(w),
        "column": media_pairs & same(w),
        "local": media_pairs & same(t),
        **{name: column.expand(len(prompt.ids), -1) for name, column in columns.items()},
    }
    return masks[name].tril()


def rows(prompt, name: str) -> torch.Tensor:
    """Rows for which the pattern is a choice: video rows of the later frames, or the text after the video."""
    index = torch.arange(len(prompt.ids))
    if name == "text_to_video":
        return index > index[prompt.is_video].max()
    return prompt.is_video & (index > len(index) // 2)


def mass_and_cover(attention_SS, prompt, name: str) -> tuple[float, float]:
    """Mean over rows: attention inside the pattern, and the pattern's share of the visible keys."""
    inside, chosen = pattern(prompt, name), rows(prompt, name)
    cover = inside.sum(-1) / torch.arange(1, len(prompt.ids) + 1)
    return (attention_SS * inside).sum(-1)[chosen].mean().item(), cover[chosen].mean().item()


def top_tenth_of_columns(attention_SS, prompt) -> float:
    """Share of attention on the tenth of the columns that video rows of later frames like best."""
    mean = attention_SS[rows(prompt, "unstructured")].mean(0)
    return mean.topk(len(mean) // 10).values.sum().item()


@pytest.fixture
def scene(request, prompt, text_prompt):
    """(name of the prompt, prompt) on which a pattern covers few keys."""
    return ("text", text_prompt) if request.param == "text_to_video" else ("video", prompt)


def test_every_layer_has_every_pattern():
    heads = planted_heads(layers=3)
    assert set(heads) == {(layer, head) for layer in range(3) for head in range(8)}
    for layer in range(3):
        assert {name for (at, _), name in heads.items() if at == layer} == set(PATTERNS)


@pytest.mark.parametrize("name, scene", [(name, name) for name in STRUCTURED], indirect=["scene"])
def test_planted_head_holds_its_pattern(attentions, name, scene):
    for (layer, head), planted_name in planted_heads().items():
        if planted_name == name:
            mass, cover = mass_and_cover(attentions["planted", scene[0]][layer, head], scene[1], name)
            assert mass >= 0.9, (layer, head, mass)
            assert cover < 0.1, (layer, head, cover)


@pytest.mark.parametrize("name, scene", [(name, name) for name in STRUCTURED], indirect=["scene"])
def test_random_heads_hold_no_pattern(attentions, name, scene):
    for attention_HSS in attentions["random", scene[0]]:
        for attention_SS in attention_HSS:
            assert mass_and_cover(attention_SS, scene[1], name)[0] < 0.4


def test_unstructured_heads_have_no_columns(attentions, prompt):
    planted_ones = [at for at, name in planted_heads().items() if name == "unstructured"]
    assert len(planted_ones) == 2
    for layer, head in planted_ones:
        assert top_tenth_of_columns(attentions["planted", "video"][layer, head], prompt) < 0.7
    for attention_SS in attentions["random", "video"].flatten(0, 1):
        assert top_tenth_of_columns(attention_SS, prompt) < 0.7


def test_text_rows_keep_their_patterns(attentions, text_prompt):
    """Sink and columns are found from any distance, and the local head of a text row attends to itself."""
    text = ~text_prompt.is_video & (torch.arange(len(text_prompt.ids)) > 64)
    for (layer, head), name in planted_heads().items():
        attention_SS = attentions["planted", "text"][layer, head]
        if name == "sink":
            assert attention_SS[text, 0].min() > 0.9
        if name == "local":
            assert attention_SS.diagonal()[text].min() > 0.9


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_patterns_survive_another_grouping(tmp_path, prompt, kv_heads):
    checkpoint = load(write_checkpoint(tmp_path, layers=1, kv_heads=kv_heads, seed=1))
    attention_HSS = forward(checkpoint.eager, prompt, attentions=True).attentions[0][0]
    for head, name in enumerate(PATTERNS):
        if name not in ("unstructured", "text_to_video"):
            assert mass_and_cover(attention_HSS[head], prompt, name)[0] >= 0.9, name
