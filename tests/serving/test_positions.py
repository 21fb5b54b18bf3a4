"""M-RoPE positions and video timing, against positions worked out by hand.

Text counts up by one in all three axes. A video whose pairs of frames lie d seconds apart takes temporal positions
start + floor(i * d * tokens_per_second); rows and columns count from start; the text after it goes on at the largest
position + 1 (Qwen2.5-VL, arXiv 2502.13923, section 2.1.2: temporal ids follow absolute time).
"""

import itertools

import torch


def positions_by_hand(before: int, grid: tuple[int, int, int], seconds: float, per_second: float, after: int):
    """int64 [3, before + t * h * w + after]; grid in tokens (patches merged 2 x 2)."""
    columns = [(i, i, i) for i in range(before)]
    for t, h, w in itertools.product(*map(range, grid)):
        columns.append((before + int(t * seconds * per_second), before + h, before + w))
    following = max(max(column) for column in columns) + 1
    columns += [(following + i,) * 3 for i in range(after)]
    return torch.tensor(columns).T


def test_by_hand_on_paper():
    """Two text tokens, two pairs of frames of 1 x 2 tokens one second apart at 2 ids a second, one text token."""
    expected = [[0, 1, 2, 2, 4, 4, 5], [0, 1, 2, 2, 2, 2, 5], [0, 1, 2, 3, 2, 3, 5]]
    assert positions_by_hand(2, (2, 1, 2), 1.0, 2, 1).tolist() == expected


def test_video_file_keeps_its_timing(answers, checkpoint):
    """SGLang samples 2 frames a second and joins them in pairs: pairs lie 1.0 s apart, to the sampling's rounding."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    prompt = answers(1, 1)["prompts"]["video file"]
    ids = torch.tensor(prompt.input_ids)
    video = (ids == config.video_token_id).nonzero().flatten()
    t, h, w = prompt.media["video_grid_thw"][0].tolist()
    assert len(video) == t * h * w // 4 and t >= 8
    before, after = int(video[0]), len(ids) - 1 - int(video[-1])
    per_second = config.vision_config.tokens_per_second
    expected = positions_by_hand(before, (t, h // 2, w // 2), 1.0, per_second, after)
    assert torch.equal(prompt.positions, expected)
    assert prompt.delta == int(expected.max()) + 1 - len(ids)
    temporal = prompt.positions[0, video].unique()
    assert len(temporal) == t, "every pair of frames has a temporal position of its own"
