"""An mp4 in which every frame differs from every other: coloured shapes drift over a background that changes hue."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sglang_mm.errors import ConfigError

SHAPES = 5


def write_video(
    path: str | Path, *, seconds: float = 20, fps: int = 4, width: int = 224, height: int = 224, seed: int = 0
) -> Path:
    """Encode round(seconds * fps) frames of width x height pixels (both even) as MPEG-4 in `path`; returns `path`.

    The same arguments give the same frames. Raises ConfigError for a size or length that no decoder would take.
    """
    frames = round(seconds * fps)
    if frames < 1:
        raise ConfigError(f"seconds={seconds} at fps={fps}", "at least one frame", "ask for more seconds or frames")
    if min(width, height) < 16 or width % 2 or height % 2:
        raise ConfigError(f"width={width}, height={height}", "even numbers >= 16", "round the size up")
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 32 * width * height
        for picture in draw_frames(frames, width, height, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def draw_frames(frames: int, width: int, height: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `frames` pictures uint8 (height, width, 3). Positions are continuous, so no two pictures are equal."""
    rng = np.random.default_rng(seed)
    start, speed = rng.uniform(size=(SHAPES, 2)), rng.uniform(0.03, 0.11, size=(SHAPES, 2))
    colours, radii = rng.integers(64, 256, size=(SHAPES, 3)), rng.uniform(0.08, 0.2, size=SHAPES)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    for i in range(frames):
        waves = np.sin(6 * x + 0.31 * i), np.sin(5 * y - 0.23 * i), np.cos(4 * (x + y) + 0.17 * i)
        picture = 96 + 64 * np.stack(waves, axis=-1)
        for k in range(SHAPES):
            cx, cy = np.abs((start[k] + speed[k] * i) % 2 - 1)  # bounces between the edges
            dx, dy = np.abs(x - cx), np.abs(y - cy)
            inside = dx**2 + dy**2 < radii[k] ** 2 if k % 2 else np.maximum(dx, dy) < radii[k]
            picture[inside] = colours[k]
        yield picture.astype(np.uint8)
