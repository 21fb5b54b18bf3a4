"""What a program of SGLang's frontend language sends becomes a video at its place, or an error naming what is wrong."""

import asyncio
import base64
import io
import re
import struct
from types import SimpleNamespace

import pytest
import torch

from sglang_mm import Engine  # noqa: F401  settles SGLang's platform before anything below imports it
from sglang_mm.errors import ConfigError
from sglang_mm.serving import frontend
from tests.examples.sgl_video import as_sgl_video, pictures_of

IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


@pytest.fixture(scope="module")
def tokens():
    """The markers of SGLang's processor for Qwen's models."""
    from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens

    pads = {1: "<|image_pad|>", 2: "<|video_pad|>"}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(convert_ids_to_tokens=lambda ids: [pads[i] for i in ids]))
    regex = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>")
    found = MultimodalSpecialTokens(image_token=IMAGE, image_token_id=1, image_token_regex=regex, video_token_id=2)
    return found.build(processor)


@pytest.mark.parametrize(
    ("text", "images", "placed"),
    [
        (f"a{IMAGE}b", ["video:1"], (f"a{VIDEO}b", None, ["video:1"])),
        (f"{IMAGE}then{IMAGE}", ["picture", "video:1"], (f"{IMAGE}then{VIDEO}", ["picture"], ["video:1"])),
        (f"{IMAGE}then{IMAGE}", ["video:1", "picture"], (f"{VIDEO}then{IMAGE}", ["picture"], ["video:1"])),
        (f"{IMAGE}{IMAGE}", ["video:2", "video:1"], (VIDEO + VIDEO, None, ["video:2", "video:1"])),
        ("USER:<image>x<image>", ["video:1", "picture"], (f"USER:{VIDEO}x{IMAGE}", ["picture"], ["video:1"])),
        (f"the word <image> {IMAGE}", ["video:1"], (f"the word <image> {VIDEO}", None, ["video:1"])),
        ("<image>?", ["picture"], (f"{IMAGE}?", ["picture"], None)),
    ],
)
def test_each_video_goes_behind_its_own_marker(tokens, text, images, placed):
    assert frontend.place(text, images, [], tokens) == placed


def test_videos_keep_the_prompt_s_order_beside_others(tokens):
    text = f"{VIDEO}a{IMAGE}b{VIDEO}"
    placed = frontend.place(text, ["video:1"], ["first.mp4", "last.mp4"], tokens)
    assert placed == (f"{VIDEO}a{VIDEO}b{VIDEO}", None, ["first.mp4", "video:1", "last.mp4"])


@pytest.mark.parametrize("text", ["no marker", IMAGE, f"{IMAGE}{IMAGE}{IMAGE}", f"{IMAGE}{IMAGE}{VIDEO}"])
def test_markers_that_do_not_match_are_refused(tokens, text):
    with pytest.raises(ConfigError, match=r"for 2 media of a program, 1 of them sgl.video.*chat_template_name"):
        frontend.place(text, ["video:1", "picture"], [], tokens)
    assert frontend.place(text, ["a", "b"], [], tokens) is None, "images alone are SGLang's to judge"


def settled(tokens, **request) -> SimpleNamespace:
    """A request as SGLang's tokenizer sees it after the hook."""
    obj = SimpleNamespace(**{"text": None, "input_ids": None, "video_data": None, "extra_key": None} | request)
    tokenizer = SimpleNamespace(decode=lambda ids: "".join({1: IMAGE}.get(i, "x") for i in ids))
    manager = SimpleNamespace(mm_processor=SimpleNamespace(mm_tokens=tokens), tokenizer=tokenizer)

    async def original(self, obj):
        assert self is manager
        return obj

    return asyncio.run(frontend.tokenize(original, manager, obj))


def test_requests_without_programs_stay_as_they_are(tokens):
    for request in ({"text": f"{IMAGE}?", "image_data": ["picture"]}, {"input_ids": [1, 3], "image_data": "picture"}):
        obj = settled(tokens, **request)
        assert {name: getattr(obj, name) for name in request} == request and obj.extra_key is None


def test_one_medium_needs_no_list_and_ids_are_read_as_text(tokens):
    assert settled(tokens, text=f"{IMAGE}?", image_data="video:1").video_data == ["video:1"]
    obj = settled(tokens, input_ids=[3, 1, 3], image_data=["video:1"])
    assert (obj.text, obj.input_ids, obj.video_data) == (f"x{VIDEO}x", None, ["video:1"])


def test_choices_scored_without_their_prompt_show_no_video(tokens):
    obj = settled(tokens, input_ids=[3, 3], image_data=["video:1"])
    assert (obj.input_ids, obj.image_data, obj.video_data) == ([3, 3], None, None)


def test_times_are_part_of_the_cache_s_key(tokens):
    keys = [
        settled(tokens, text=IMAGE, image_data=[f"video:{header}1"], extra_key=key).extra_key
        for key in (None, "mine")
        for header in ("", "span=2.5;", "span=5;")
    ]
    assert keys[0] is None and keys[3] == "mine" and len(set(keys)) == 6


def test_frames_arrive_in_order():
    sent = frontend.load_video(None, as_sgl_video(pictures := pictures_of(4)))
    assert torch.equal(sent.get_frames_as_tensor([0, 1, 2, 3]), torch.stack(pictures))
    assert (len(sent), sent.avg_fps, sent.frame_shape) == (4, 2.0, (28, 56))
    assert frontend.load_video(lambda file, use_gpu: (file, use_gpu), "a.mp4", use_gpu=False) == ("a.mp4", False)


def test_an_odd_number_of_frames_ends_with_the_last_one_twice():
    sent = frontend.SentVideo(as_sgl_video(pictures := pictures_of(3)))
    assert torch.equal(sent.get_frames_as_tensor(list(range(len(sent)))), torch.stack([*pictures, pictures[-1]]))


def test_the_span_says_how_far_frames_lie_apart():
    assert frontend.SentVideo(as_sgl_video(pictures_of(5), "span=10.0;")).avg_fps == 0.4
    assert frontend.SentVideo(as_sgl_video(pictures_of(1), "span=10.0;")).avg_fps == 2.0


@pytest.mark.parametrize("config", [{}, {"fps": 1.0, "max_frames": 4}, {"nframes": 4}])
def test_no_frame_is_sampled_away(config):
    from sglang.srt.multimodal.processors import qwen_vl

    sent = frontend.SentVideo(as_sgl_video(pictures_of(12), "span=1.1;"))  # ten a second; SGLang would take four
    frames, told = asyncio.run(frontend.preprocess_video(qwen_vl.preprocess_video, sent, video_config=config))
    assert len(frames) == 12 and told["frames_indices"].tolist() == list(range(12))
    assert told["fps"] == pytest.approx(10) and told["total_num_frames"] == 12


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """The headers of a PNG of any size, without its pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    return frontend.SIGNATURE + b"".join(struct.pack(">I", len(d)) + k + d + b"\0" * 4 for k, d in chunks)


@pytest.mark.parametrize(
    ("data", "given"),
    [
        (b"", "0 frames"),
        (b"abc", "3 bytes with no PNG at byte 0"),
        (png(8, 8)[:40], "40 bytes that end inside the PNG at byte 0"),
        (png(8, 8) + b"tail", "no PNG at byte"),
        (png(0, 8), "damaged"),
        (png(8, 8), "cannot be decoded"),
        (png(8, 8) + png(8, 9), "frames of 2 sizes"),
        (png(8, 8) * 769, "769 frames of 49216 pixels together"),
        (png(32768, 32769), "1 frames of 1073774592 pixels together"),
    ],
)
def test_what_is_no_video_is_refused_before_it_is_decoded(data, given):
    with pytest.raises(ConfigError, match=rf"{given}.*Allowed: .*Remedy: ") as refused:
        frontend.SentVideo("video:" + base64.b64encode(data).decode())
    assert isinstance(refused.value, ValueError), "which SGLang answers with status 400"


@pytest.mark.parametrize("payload", ["video:!!!", "video:span=50000;" + base64.b64encode(png(8, 8)).decode()])
def test_text_that_is_no_video_is_refused(payload):
    with pytest.raises(ConfigError, match=r"3 characters that are not base64|50000 seconds"):
        frontend.SentVideo(payload)


def test_a_cut_picture_inside_a_sound_file_is_refused():
    picture = io.BytesIO(base64.b64decode(as_sgl_video(pictures_of(1))[len("video:") :])).getvalue()
    broken = picture.replace(b"IDAT", b"IDAX")
    with pytest.raises(ConfigError, match="cannot be decoded"):
        frontend.SentVideo("video:" + base64.b64encode(broken).decode())
