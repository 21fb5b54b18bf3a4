"""The mp4 decodes to as many frames as asked, no two of them alike, and the command line writes the same files."""

import subprocess
import sys

import numpy as np
import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.tiny import write_video
from sglang_mm.tiny.__main__ import main


def decode(path) -> tuple[np.ndarray, float]:
    import decord

    reader = decord.VideoReader(str(path))
    return reader.get_batch(list(range(len(reader)))).asnumpy(), reader.get_avg_fps()


@pytest.mark.parametrize("seconds, fps, width, height", [(20, 4, 224, 224), (3, 2, 112, 64)])
def test_decoded_frames_differ(tmp_path, seconds, fps, width, height):
    path = write_video(tmp_path / "new" / "v.mp4", seconds=seconds, fps=fps, width=width, height=height, seed=3)
    frames, found_fps = decode(path)
    assert frames.shape == (seconds * fps, height, width, 3)
    assert found_fps == pytest.approx(fps)
    small = frames[:, ::8, ::8].reshape(len(frames), -1).astype(int)
    distances = np.abs(small[:, None] - small).mean(-1) + 255 * np.eye(len(small))
    assert distances.min() > 2, "mean difference of two frames, of 255"


def test_seed_decides_the_frames(tmp_path):
    first, again, other = (write_video(tmp_path / f"{i}.mp4", seconds=1, seed=seed) for i, seed in enumerate([0, 0, 1]))
    assert np.array_equal(decode(first)[0], decode(again)[0])
    assert not np.array_equal(decode(first)[0], decode(other)[0])


@pytest.mark.parametrize("wrong", [{"width": 225}, {"height": 8}, {"seconds": 0}])
def test_impossible_videos_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_video(tmp_path / "v.mp4", **wrong)


def test_command_line(tmp_path, random):
    main(["video", str(tmp_path / "v.mp4"), "--seconds", "2", "--fps", "3", "--size", "64"])
    assert decode(tmp_path / "v.mp4")[0].shape == (6, 64, 64, 3)
    main(["checkpoint", str(tmp_path / "random"), "--random"])
    written = (tmp_path / "random" / "model.safetensors").read_bytes()
    assert written == (random.path / "model.safetensors").read_bytes()


def test_package_imports_without_its_tools():
    code = "import sys, sglang_mm.tiny; print(sorted({'av', 'transformers', 'sglang'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
