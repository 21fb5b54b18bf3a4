from types import SimpleNamespace

import numpy as np
import pytest

from sglang_mm.tiny import write_checkpoint
from sglang_mm.tiny.video import draw_frames
from tests.tiny.prompts import video_prompt


def load(path):
    """processor, `eager` model (it returns attention) and `sdpa` model of the checkpoint at `path`."""
    from transformers import AutoProcessor
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    def model(kind):
        return Model.from_pretrained(path, dtype="float32", attn_implementation=kind).eval()

    processor = AutoProcessor.from_pretrained(path)
    return SimpleNamespace(path=path, processor=processor, eager=model("eager"), sdpa=model("sdpa"))


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="session")
def random(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("random"), planted=False))


@pytest.fixture(scope="session", params=["planted", "random"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def frames():
    """24 frames that become a grid of 12 x 6 x 12 tokens: a column is 1/12, a frame 1/12 of them."""
    return np.stack(list(draw_frames(24, width=336, height=168, seed=0)))


@pytest.fixture(scope="session")
def prompt(planted, frames):
    return video_prompt(planted.processor, frames)
