"""Reading takes memory for a piece of a video and not for all of it."""

import json
import subprocess
import sys

import pytest

from sglang_mm.tiny import write_checkpoint, write_video

pytestmark = pytest.mark.slow
MOST_BYTES = 2_000_000_000  # 1.3 GB at 600 frames, 1.5 at 2,400; all frames of the latter take 1.7, their floats 2.7


@pytest.mark.parametrize("frames", [600, 2400])
def test_growth_is_bounded(tmp_path, frames):
    video = write_video(tmp_path / "v.mp4", seconds=frames / 2, fps=2, width=640, height=360)
    checkpoint = write_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "tests.pixels.peak", str(checkpoint), str(video), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["frames"] == frames and told["stored_bytes"] > 400_000_000
    assert told["grown_bytes"] < MOST_BYTES
