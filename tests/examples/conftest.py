"""One server of two ranks for all tests of this folder."""

import base64
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sglang_mm.demo import server
from sglang_mm.tiny import write_checkpoint, write_video
from tests.examples.sgl_video import as_sgl_video, frames_of


@pytest.fixture(scope="package")
def served(tmp_path_factory):
    """url, video (16 frames, two a second), picture, checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    found = SimpleNamespace(checkpoint=str(write_checkpoint(folder / "tiny-qwen2.5-vl")))
    found.video = str(write_video(folder / "shapes.mp4", seconds=8, fps=2))
    found.picture = str(folder / "picture.png")
    payload = as_sgl_video(frames_of(found.video, 1))
    (folder / "picture.png").write_bytes(base64.b64decode(payload.removeprefix("video:")))
    port, log = server.free_port(), folder / "log"
    command = [sys.executable, "-m", "sglang_mm.launch", "--model-path", found.checkpoint, "--cp", "2"]
    command += ["--cp-min-tokens", "64", "--schedule", "ring", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        server.wait_until_ready(process, log)
        found.url = f"http://127.0.0.1:{port}"
        yield found
    finally:
        server.stop(process)
