"""The checkpoint is deterministic, never speaks of media, and its output depends on all that it attends to."""

import numpy as np
import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.tiny import write_checkpoint
from sglang_mm.tiny.checkpoint import SPEAKABLE
from sglang_mm.tiny.tokenizer import MEDIA, SPECIAL_IDS
from sglang_mm.tiny.video import draw_frames
from tests.tiny.prompts import Prompt, forward, log_probs, video_prompt

MEDIA_IDS = [SPECIAL_IDS[token] for token in MEDIA]
ONE_IN_A_MILLION = 14  # nats between the likeliest token and one that must not be sampled
MOVED = 1e-3  # a hundred times what two orders of summation differ by


def test_same_arguments_write_same_bytes(planted, random, tmp_path):
    again, other = write_checkpoint(tmp_path / "again"), write_checkpoint(tmp_path / "other", seed=1)
    for file in planted.path.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    weights = [(path / "model.safetensors").read_bytes() for path in (planted.path, other, random.path)]
    assert len(set(weights)) == 3


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"kv_heads": 3}, {"kv_heads": 0}])
def test_impossible_shapes_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_checkpoint(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()


def test_media_ids_are_never_likely(either, frames):
    prompt = video_prompt(either.processor, frames[:8, :84, :112])
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 264, (500,), generator=rng)
        with torch.no_grad():
            text = either.sdpa(input_ids=ids[None]).logits[0]
        pixels = 2 * torch.randn(prompt.pixels.shape, generator=rng)
        video = forward(either.sdpa, Prompt(prompt.ids, pixels * (seed % 3), prompt.grid)).logits[0]
        for logits in (text, video):
            gap = logits.max(-1).values - logits[:, MEDIA_IDS].max(-1).values
            assert gap.min() > ONE_IN_A_MILLION
            assert torch.isin(logits.argmax(-1), torch.tensor(SPEAKABLE)).all()


def test_losing_a_quarter_of_the_keys_shows(either, prompt):
    length = len(prompt.ids)
    whole = log_probs(either.sdpa, prompt)[-1]
    for quarter in range(4):
        keep = torch.ones(length, dtype=torch.bool)
        keep[max(1, quarter * length // 4) : min(length - 1, (quarter + 1) * length // 4)] = False
        assert (log_probs(either.sdpa, prompt, keep=keep)[-1] - whole)[SPEAKABLE].abs().max() > MOVED


def test_swapped_frames_show(either, prompt, frames):
    whole = log_probs(either.sdpa, prompt)[-1]
    order = np.arange(len(frames))
    order[[2, 9]] = order[[9, 2]]
    swapped = log_probs(either.sdpa, video_prompt(either.processor, frames[order]))[-1]
    assert (swapped - whole)[SPEAKABLE].abs().max() > MOVED


def test_answers_vary(planted, frames):
    def answer(prompt, tokens=12):
        for _ in range(tokens):
            prompt = prompt.then(int(log_probs(planted.sdpa, prompt)[-1].argmax()))
        return tuple(prompt.ids[-tokens:].tolist())

    other = np.stack(list(draw_frames(6, width=112, height=84, seed=1)))
    videos = frames[:6, :84, :112], other, frames[6:12, :84, :112]
    questions = "What is it?", "Who was there?", "Count them."
    answers = {answer(video_prompt(planted.processor, v, after=q)) for v in videos for q in questions}
    assert len(answers) >= 5, answers
    assert len({tokens[0] for tokens in answers}) >= 2, answers
    assert all(len(set(tokens)) >= 3 for tokens in answers), answers


def test_log_probs_do_not_depend_on_summation_order(either):
    """Two implementations of attention over 2,000 tokens agree to four ulps of the largest attention logit, near 80."""
    frames = np.stack(list(draw_frames(28, width=336, height=336, seed=0)))
    prompt = video_prompt(either.processor, frames)
    assert len(prompt.ids) > 2000
    difference = (log_probs(either.eager, prompt) - log_probs(either.sdpa, prompt))[~prompt.is_video]
    assert difference.abs().max() < 4 * 80 * torch.finfo(torch.float32).eps


def test_sglang_turns_keys_as_transformers_does(either, prompt, monkeypatch):
    from sglang.srt.layers.rotary_embedding import base, get_rope
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

    monkeypatch.setattr(base, "_is_cpu", True)  # else it looks for a CUDA kernel that forward_native does not use
    text = either.sdpa.config.text_config
    theta = text.rope_parameters["rope_theta"]
    rope = get_rope(32, 32, text.max_position_embeddings, theta, True, dict(text.rope_parameters), torch.float32)
    positions = torch.cat([prompt.positions, torch.randint(1 << 20, (3, 64))], dim=1)
    q, k = torch.randn(positions.shape[1], 8, 32), torch.randn(positions.shape[1], 2, 32)
    cos, sin = either.sdpa.model.language_model.rotary_emb(q, positions[:, None])
    expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    actual = rope.forward_native(positions, q.flatten(1), k.flatten(1))
    for theirs, ours in zip(actual, expected):
        torch.testing.assert_close(theirs, ours[0].flatten(1), rtol=1e-6, atol=1e-5)
