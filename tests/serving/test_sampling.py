"""Which frames a video is seen at: SGLang's where it is short, more of them where it is long; the same pixels."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch

from sglang_mm import Engine  # before SGLang: it decides then on which platform it is
from sglang_mm.serving.media_access import RequestError
from sglang_mm.tiny import write_video

MILLION = 1_000_000


@pytest.fixture(scope="module")
def sampling():
    assert Engine
    from sglang_mm.serving import sampling

    return sampling


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A video of 240 frames of 320 x 180 in 60 seconds, as SGLang opens it."""
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    path = write_video(tmp_path_factory.mktemp("video") / "v.mp4", seconds=60, fps=4, width=320, height=180)
    return lambda: VideoDecoderWrapper(str(path))


def clip(seconds: float, fps: float = 25.0, height: int = 1080, width: int = 1920):
    """What planning asks of a video; a day of film cannot be written in a test."""

    class Clip:
        avg_fps = fps

        def __len__(self):
            return round(seconds * fps)

        def __getitem__(self, index):
            return torch.empty(height, width, 3)

    return Clip()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_frames": 10},
        {"total_pixels": MILLION},
        {"nframes": 8},
        {"resized_height": 100, "resized_width": 50},
        {"max_pixels": 110_000},
    ],
)
def test_frames_are_sglangs_pixel_by_pixel(sampling, decoder, config, monkeypatch):
    """Decoded and resized 3 frames at a time; some of these sizes SGLang's rule would change if applied twice."""
    from sglang.srt.multimodal.processors import qwen_vl

    monkeypatch.setattr(sampling, "PIECE_BYTES", 3 * 320 * 180 * 3)
    expected, metadata = asyncio.run(qwen_vl.preprocess_video(decoder(), video_config=config))
    how = sampling.plan(decoder(), config)
    frames, told = sampling.sample(decoder(), how)
    assert frames.shape == (how.frames, 3, how.height, how.width)
    assert torch.equal(frames, expected)
    assert told["frames_indices"].tolist() == metadata["frames_indices"].tolist() and told["fps"] == metadata["fps"]


@pytest.mark.parametrize("fits", [32_768, 128_000, 200_000, MILLION])
@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (180, 320)])
def test_videos_of_up_to_768_frames_are_sampled_as_ever(sampling, size, fits):
    for seconds in (2, 60, 152, 180, 300, 384):
        video = clip(seconds, 25.0, *size)
        assert sampling.plan(video, {}, sampling.room({}, fits, 1)) == sampling.plan(video, {})


@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (180, 320), (2000, 100)])
@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize(("fits", "seconds"), [(128_000, 3600), (MILLION, 3600), (MILLION, 24 * 3600), (60_000, 900)])
def test_long_videos_are_seen_at_more_frames_where_they_fit(sampling, fits, seconds, videos, size):
    video = clip(seconds, 25.0, *size)
    stock, how = sampling.plan(video, {}), sampling.plan(video, {}, sampling.room({}, fits, videos))
    assert stock.frames == 768 <= how.frames <= min(7200, 2 * seconds)
    assert how == stock or how.tokens <= 0.9 * fits / videos
    if fits == MILLION and videos == 1:
        assert how.frames == (7200 if size[0] != 2000 else how.frames) and how.frames > 2 * stock.frames


def test_a_video_that_fits_with_sglangs_limits_still_fits(sampling):
    """768 frames of 320 x 180 have 55,296 tokens, and cannot have fewer."""
    video = clip(3600, 25.0, 180, 320)
    assert sampling.plan(video, {}, sampling.room({}, 60_000, 1)).tokens == sampling.plan(video, {}).tokens < 60_000


def test_the_users_choice_holds(sampling, monkeypatch):
    for chosen in ({"max_frames": 100}, {"total_pixels": MILLION}, {"nframes": 64}):
        assert sampling.room(chosen, MILLION, 1) is None
    assert sampling.room({"fps": 1}, MILLION, 2) == 450_000
    assert sampling.plan(clip(3600), {"fps": 0.1}, MILLION).frames == 360
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "1000000")
    assert sampling.room({}, MILLION, 1) is None


@pytest.mark.parametrize(("seconds", "fps"), [(0, 25.0), (0.04, 25.0), (9, 0.0), (9, None), (9, math.nan)])
def test_videos_without_frames_or_time_are_refused(sampling, seconds, fps):
    video = clip(seconds)
    type(video).avg_fps = fps
    with pytest.raises(RequestError, match="Allowed: at least 2 frames"):
        sampling.plan(video, {})


def test_a_sparse_video_is_told(sampling, caplog):
    with caplog.at_level("INFO"):
        sampling.plan(clip(10), {})
        assert caplog.messages == []
        sampling.plan(clip(3600), {})
    assert "3600 s is seen at 768 frames, one in 4.7 s" in caplog.text and "--mm-process-config" in caplog.text


def test_what_does_not_fit_is_told_before_decoding():
    from sglang_mm.serving.prompt_limit import PromptLimit

    manager = SimpleNamespace(max_req_input_len=131_066, context_len=1 << 20)
    limit = PromptLimit.of(manager)
    limit.check(131_065, "a prompt")
    with pytest.raises(RequestError, match="fewer than 131,066 tokens in a prompt, bound by the memory of a rank, for"):
        limit.check(131_066, "a prompt of 131,066 tokens")
    with pytest.raises(RequestError, match=r"bound by the context length of 128,000.*--context-length"):
        PromptLimit(127_994, 128_000).check(200_000, "a prompt of 200,000 tokens")
