"""What `sgl.video` sends, made without OpenCV: `video:` and the base64 of PNG after PNG."""

import base64
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch


def as_sgl_video(pictures: list[torch.Tensor], header: str = "") -> str:
    """pictures: uint8 [height, width, 3]. header: `span=S;` or nothing."""
    from PIL import Image

    written = io.BytesIO()
    for picture in pictures:
        Image.fromarray(picture.numpy()).save(written, format="PNG")
    return f"video:{header}" + base64.b64encode(written.getvalue()).decode()


def pictures_of(count: int) -> list[torch.Tensor]:
    """Different ones, of 28 x 56 pixels."""
    drawn = torch.Generator().manual_seed(count)
    return list(torch.randint(0, 256, (count, 28, 56, 3), dtype=torch.uint8, generator=drawn))


def frames_of(path: str | Path, count: int) -> list[torch.Tensor]:
    """Evenly spaced frames, the first and the last among them, as sgl.video takes them."""
    import decord

    reader = decord.VideoReader(str(path))
    chosen = np.linspace(0, len(reader) - 1, count, dtype=int)
    return list(torch.from_numpy(reader.get_batch(chosen.tolist()).asnumpy()))


def read_without_opencv() -> None:
    """Where OpenCV is not installed, sgl.video reads files by decord; all else of a program stays SGLang's."""
    if importlib.util.find_spec("cv2") is not None:
        return
    import decord
    from sglang.lang import interpreter

    from sglang_mm.serving import endpoint

    def span_s(path: str) -> float:
        reader = decord.VideoReader(str(path))
        return (len(reader) - 1) / reader.get_avg_fps()

    interpreter.encode_video_base64 = lambda path, num_frames: as_sgl_video(frames_of(path, num_frames))
    endpoint._span_s = span_s
