"""Which frames of a video file a request uses, at which size: known before any frame is decoded.

SGLang takes two frames a second, at most 768 of them, and shrinks them until a video has at most 115,200 tokens; an
hour of video is then one frame in five seconds. Videos of up to 768 frames (6.4 minutes) are sampled here as there. For
longer ones the limits grow with what fits into one prompt:

    frames   two a second up to 7,200 (one hour), as many as fit
    pixels   nine tenths of what fits, shared by the request's videos

The size of a frame stays within SGLang's bounds, 128 to 768 tokens per pair. Who sets frames or pixels by
--mm-process-config or the variable VIDEO_MAX_PIXELS has chosen; then that holds.
"""

import asyncio
import ctypes
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sglang.srt.multimodal.processors import qwen_vl

from sglang_mm.serving.frontend import SAMPLING, SentVideo
from sglang_mm.serving.media_access import RequestError

logger = logging.getLogger(__name__)
TOKEN_PIXELS = qwen_vl.IMAGE_FACTOR**2  # of one frame; a token covers them in FRAME_FACTOR frames
MAX_FRAMES = 7200
SHARE = 0.9
FLOOR = 1.05  # SGLang never shrinks frames below so many times their smallest size
ATTEMPTS = 4
CHOSEN = {"nframes", "max_frames", "total_pixels"}
PIECE_BYTES = 128 << 20  # decoded at once: an hour of full-size frames is 45 GB
RESIZED_BYTES = 32 << 20  # resized at once, which takes four times as much in floats


@dataclass(frozen=True)
class Sampling:
    """frames: how many. height, width: of each one, in pixels. config: what SGLang's preprocess_video is to be told."""

    frames: int
    height: int
    width: int
    config: dict

    @property
    def tokens(self) -> int:
        return self.frames // qwen_vl.FRAME_FACTOR * (self.height * self.width // TOKEN_PIXELS)


def room(config: dict, fits: int, videos: int) -> int | None:
    """Tokens that each of a request's videos may have, or None where its user has set limits of frames or pixels.

    fits: tokens of the longest prompt.
    """
    if CHOSEN & config.keys() or "VIDEO_MAX_PIXELS" in os.environ:
        return None
    return int(SHARE * fits / videos)


def plan(video, config: dict, room: int | None = None) -> Sampling:
    """How SGLang's preprocess_video samples this video under `config`, with more frames where a long one has room.

    Raises RequestError for what has no frames.
    """
    total, fps = len(video), video.avg_fps
    if total < qwen_vl.FRAME_FACTOR or not fps or not math.isfinite(fps) or fps <= 0:
        raise RequestError(
            f"a video of {total} {'frame' if total == 1 else 'frames'} at {fps} a second",
            f"at least {qwen_vl.FRAME_FACTOR} frames",
            "send a single frame as an image; otherwise check how the file was written",
        )  # fmt: skip
    if isinstance(video, SentVideo):  # a program has chosen its frames
        return _sampling(
            video, {**{key: value for key, value in config.items() if key not in SAMPLING}, "nframes": total}
        )
    found, wanted = _sampling(video, config), config.get("fps", qwen_vl.FPS) * total / fps
    if room is not None and wanted > qwen_vl.FPS_MAX_FRAMES:
        found = max(found, _with_room(video, config, room), key=lambda how: how.frames)
    _tell_of_sparse(found.frames, total / fps, config)
    return found


def _with_room(video, config: dict, room: int) -> Sampling:
    """As many frames as have room, small enough for it; none where even the smallest have not."""
    least = FLOOR * config.get("min_pixels", qwen_vl.VIDEO_MIN_PIXELS)
    raised = {**config, "total_pixels": room * TOKEN_PIXELS}
    raised["max_frames"] = max(
        qwen_vl.FRAME_FACTOR, min(MAX_FRAMES, int(qwen_vl.FRAME_FACTOR * room * TOKEN_PIXELS / least))
    )
    for _ in range(ATTEMPTS):  # a video of few pixels is enlarged, and takes more than was counted on
        found = _sampling(video, raised)
        if found.tokens <= room:
            return found
        raised["max_frames"] = max(qwen_vl.FRAME_FACTOR, int(found.frames * room / found.tokens))
    return Sampling(0, 0, 0, {})


def _sampling(video, config: dict) -> Sampling:
    frames = qwen_vl.smart_nframes(config, total_frames=len(video), video_fps=video.avg_fps)
    height, width = _size(video[0].shape[:2], frames, config)  # as decoded: turned, where the file says so
    return Sampling(frames, height, width, {**config, "resized_height": height, "resized_width": width})


def _size(shape: tuple[int, int], frames: int, config: dict) -> tuple[int, int]:
    """Height and width that preprocess_video gives each frame."""
    if "resized_height" in config and "resized_width" in config:
        return qwen_vl.smart_resize(config["resized_height"], config["resized_width"])
    least = config.get("min_pixels", qwen_vl.VIDEO_MIN_PIXELS)
    share = config.get("total_pixels", qwen_vl.VIDEO_TOTAL_PIXELS) / frames * qwen_vl.FRAME_FACTOR
    most = max(min(config.get("max_pixels", qwen_vl.VIDEO_MAX_PIXELS), share), int(least * FLOOR))
    return qwen_vl.smart_resize(*shape, min_pixels=least, max_pixels=min(config.get("max_pixels", most), most))


def _tell_of_sparse(frames: int, seconds: float, config: dict) -> None:
    """Say in the log that a video is seen at fewer frames than asked for: SGLang says nothing."""
    wanted = config.get("fps", qwen_vl.FPS) * seconds
    if "nframes" not in config and frames < 0.9 * wanted:
        logger.info(
            "a video of %.0f s is seen at %s frames, one in %.1f s. --mm-process-config "
            "'{\"video\": {\"max_frames\": N}}' raises that, as far as the prompt fits.",
            seconds, f"{frames:,}", seconds / frames,
        )  # fmt: skip


def sample(video, sampling: Sampling) -> tuple[torch.Tensor, dict]:
    """preprocess_video of SGLang: frames uint8 [frames, 3, height, width] and their metadata; in a thread."""
    indices, metadata = chosen(video, sampling)
    return torch.cat(list(pieces(video, sampling, indices))), metadata


def chosen(video, sampling: Sampling) -> tuple[list[int], dict]:
    """Indices of the frames that preprocess_video of SGLang takes, and its metadata; none of them is decoded."""
    frame = torch.zeros(1, sampling.height, sampling.width, 3, dtype=torch.uint8)  # what SGLang will find to resize
    video.get_frames_as_tensor = lambda indices: frame
    try:
        _, metadata = asyncio.run(qwen_vl.preprocess_video(video, video_config=sampling.config))
    finally:
        del video.get_frames_as_tensor
    return metadata["frames_indices"].tolist(), metadata


def pieces(video, sampling: Sampling, indices: list[int]) -> Iterator[torch.Tensor]:
    """Frames uint8 [n, 3, height, width] as preprocess_video would resize them, decoded and resized piece by piece.

    n is even but for the last piece, and so small that decoder and resizing hold some 3 * PIECE_BYTES at once.
    """
    of_frame = math.prod(video[0].shape)
    decoded = _even(PIECE_BYTES // of_frame)  # decoders are opened anew for each piece: not too few
    resized = _even(RESIZED_BYTES // of_frame)
    for start in range(0, len(indices), decoded):
        frames = video.get_frames_as_tensor(indices[start : start + decoded])
        _rest(video)
        for some in frames.split(resized):
            yield _resized(some, sampling)
        del frames, some
        _give_back_memory()


def _rest(video) -> None:
    """Until the next piece is asked for: decord's threads go on decoding meanwhile, gigabytes of frames, so it is
    closed and opened again."""
    if hasattr(decoder := getattr(video, "_decoder", None), "seek"):
        path = video._tmp_path or video._source
        del video._decoder, decoder  # its threads end before the next one's begin
        video._decoder = _opened_by_decord(path)


def _opened_by_decord(path: str):
    """With one thread: each further one holds frames of its own."""
    import decord

    return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)


def _give_back_memory() -> None:
    """Of pieces that have gone: glibc keeps it otherwise, in an arena for each of a decoder's threads."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _even(frames: int) -> int:
    return max(qwen_vl.FRAME_FACTOR, frames // qwen_vl.FRAME_FACTOR * qwen_vl.FRAME_FACTOR)


def _resized(frames: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """uint8 [n, h, w, 3] to [n, 3, height, width], as preprocess_video itself would resize them."""
    resize, size = qwen_vl.torchvision.transforms.functional.resize, [sampling.height, sampling.width]
    return resize(frames.permute(0, 3, 1, 2), size, interpolation=qwen_vl.InterpolationMode.BILINEAR)
