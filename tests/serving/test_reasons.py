"""When a prefill batch is sharded: for its new tokens, or for the media that they touch."""

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from sglang_mm.config import Config
from sglang_mm.serving.plan import reason_for_stock

CONFIG = Config(cp=4, cp_min_tokens=512)
SHORT, FEW = "below --cp-min-tokens", "fewer new tokens than ranks"


def batch(*requests: tuple[int, int, list | None], **other):
    """requests: (cached tokens, new tokens, first and last tokens of its media or None for a text request)"""
    prefixes, lengths, offsets = map(list, zip(*requests))
    items = [None if own is None else SimpleNamespace(mm_items=[SimpleNamespace(offsets=own)]) for own in offsets]
    fields = {
        "forward_mode": ForwardMode.EXTEND,
        "extend_prefix_lens_cpu": prefixes,
        "extend_seq_lens_cpu": lengths,
        "mm_inputs": items,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
        "multi_item_delimiter_indices": None,
        "token_indices_to_pool": None,
        "input_embeds": None,
    }
    return SimpleNamespace(**fields | other)


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([(0, 511, None)], SHORT),
        ([(0, 512, None)], None),
        ([(0, 20, None), (0, 600, None)], None),
        ([(900, 30, [(5, 924)])], None),  # the last rows of a long video, and a question
        ([(925, 30, [(5, 924)])], SHORT),  # the video is cached to its end
        ([(0, 30, [(30, 900)])], SHORT),  # the video comes with a later chunk
        ([(0, 31, [(30, 900)])], None),
        ([(0, 300, [(5, 100), (110, 250)])], SHORT),  # small images, however many
        ([(922, 3, [(5, 924)])], FEW),
    ],
)
def test_tokens_and_media_decide(requests, reason):
    assert reason_for_stock(batch(*requests), CONFIG) == reason


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("forward_mode", ForwardMode.MIXED, "batch mixes prefill with decode or speculation"),
        ("capture_hidden_mode", CaptureHiddenMode.FULL, "hidden states requested"),
        ("multi_item_delimiter_indices", [3], "multi-item scoring"),
        ("input_embeds", object(), "input embeddings given instead of ids"),
    ],
)
def test_what_is_asked_decides(field, value, reason):
    assert reason_for_stock(batch((0, 600, None), **{field: value}), CONFIG) == reason


def test_batches_without_media():
    assert reason_for_stock(batch((0, 100, None), mm_inputs=None), CONFIG) == SHORT
