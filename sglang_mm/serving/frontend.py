"""`sgl.video` in programs of SGLang's frontend language, which SGLang 0.5.23 sends but cannot read.

A program sends `video:` and the base64 of its frames, PNG after PNG, among the images, and puts an image's marker where
the video belongs. Here both become a video before the prompt is tokenized, in the order of the prompt.

A program does not say when its frames were taken. They are taken to be half a second apart, which is how the model was
trained and what a video file is sampled at; `video:span=S;` before the base64 says that S seconds lie between the first
and the last one, and `serving/endpoint.py` sends it. All frames sent are used, whatever the server's sampling says.
"""

import base64
import re
from itertools import pairwise

import torch
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.utils.common import load_image
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from sglang_mm.serving.media_access import RequestError

PREFIX = "video:"
SPAN = re.compile(r"video:span=(\d{1,9}(?:\.\d{1,9})?);")
FRAMES_PER_SECOND = 2.0
MAX_SPAN_S = 43200  # rotary positions follow time, two a second, and must stay below those of the model
MAX_FRAMES = 768  # as many as SGLang itself takes from a file
MAX_PIXELS = 2**30  # of all frames together: 3 GiB decoded, or 768 frames of 1280 x 1024
SENTINEL = "<image>"  # the marker of frontend templates that know no better one
IMAGE_PAD = "<|image_pad|>"
SAMPLING = ("fps", "nframes", "min_frames", "max_frames")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


async def tokenize(original, manager, obj, *args, **kwargs):
    """Around-hook on TokenizerManager._tokenize_one_request: media and prompt as the processor wants them.

    Raises RequestError, a ValueError that SGLang answers with status 400, if markers and media do not match.
    """
    tokens = getattr(manager.mm_processor, "mm_tokens", None)
    if obj.image_data and tokens is not None and getattr(tokens, "image_token_regex", None) is not None:
        _settle(obj, tokens, manager.tokenizer)
    return await original(manager, obj, *args, **kwargs)


def load_video(original, video_file, *args, **kwargs):
    """Around-hook on SGLang's load_video, which runs in its threads for media: the frames a program sent."""
    if is_sent(video_file):
        return SentVideo(video_file)
    return original(video_file, *args, **kwargs)


def preprocess_video(original, vr, *args, video_config=None, **kwargs):
    """Around-hook on Qwen's preprocess_video: a program has chosen its frames, so none is left out."""
    video_config = video_config or {}
    if isinstance(vr, SentVideo):
        video_config = {key: value for key, value in video_config.items() if key not in SAMPLING}
        video_config["nframes"] = len(vr)
    return original(vr, *args, video_config=video_config, **kwargs)


def is_sent(medium) -> bool:
    """Whether a medium of a request is a program's video."""
    return isinstance(medium, str) and medium.startswith(PREFIX)


def _settle(obj, tokens, tokenizer) -> None:
    """Move a program's videos from the images of `obj` to its videos, in the order of the prompt."""
    images = obj.image_data if isinstance(obj.image_data, list) else [obj.image_data]
    sent = any(map(is_sent, images))
    text = obj.text
    if not isinstance(text, str):
        if not sent or not obj.input_ids:
            return
        text = tokenizer.decode(obj.input_ids)  # as SGLang's processors do with ids and media
        if not re.search(tokens.image_token_regex, text):  # the choices of a sgl.select, scored without their prompt
            obj.image_data = [image for image in images if not is_sent(image)] or None
            return
    elif not sent and SENTINEL not in text:
        return
    videos = obj.video_data or []
    placed = place(text, images, videos if isinstance(videos, list) else [videos], tokens)
    if placed is not None:
        obj.input_ids = None
        obj.text, obj.image_data, obj.video_data = placed
    spans = [header[1] if (header := SPAN.match(image)) else "" for image in images if is_sent(image)]
    if any(spans) and hasattr(obj, "extra_key"):
        # SGLang's prefix cache tells videos apart by their pixels alone, but K/V also hold the frames' times
        obj.extra_key = f"{obj.extra_key or ''}|spans {','.join(spans)}"


def place(text: str, images: list, videos: list, tokens) -> tuple[str, list | None, list | None] | None:
    """Text, images and videos with each program's video behind a video's marker; None where nothing is to be done.

    tokens: the MultimodalSpecialTokens of SGLang's processor. Raises RequestError if a program's video has no marker.
    """
    sent = sum(map(is_sent, images))
    parts = re.split(tokens.get_combined_regex(), text)
    kinds = [tokens.get_modality_of_token(part) for part in parts]
    if kinds.count(Modality.IMAGE) != len(images):  # then a literal <image> is a word of the text, not a marker
        kinds = [None if part == SENTINEL != tokens.image_token else kind for part, kind in zip(parts, kinds)]
    if (kinds.count(Modality.IMAGE), kinds.count(Modality.VIDEO)) != (len(images), len(videos)):
        if not sent:
            return None  # SGLang's to judge
        raise RequestError(
            f"{kinds.count(Modality.IMAGE)} markers of images and {kinds.count(Modality.VIDEO)} of videos in a prompt "
            f"for {len(images)} media of a program, {sent} of them sgl.video, and {len(videos)} other videos",
            f"one image's marker, {tokens.image_token}, for each medium of a program",
            "give sgl.RuntimeEndpoint the model's chat_template_name, for Qwen's models 'qwen2-vl'",
        )
    waiting = {Modality.IMAGE: iter(images), Modality.VIDEO: iter(videos)}
    placed = {Modality.IMAGE: [], Modality.VIDEO: []}
    for i, kind in enumerate(kinds):
        if kind not in waiting:
            continue
        medium = next(waiting[kind])
        if is_sent(medium) and kind is Modality.IMAGE:
            kind, parts[i] = Modality.VIDEO, _video_marker(tokens)
        elif parts[i] == SENTINEL:
            parts[i] = tokens.image_token
        placed[kind].append(medium)
    return "".join(parts), placed[Modality.IMAGE] or None, placed[Modality.VIDEO] or None


def _video_marker(tokens) -> str:
    """`<|vision_start|><|video_pad|><|vision_end|>` for Qwen's models."""
    if tokens.video_token is None:
        raise RequestError("sgl.video", "sgl.image, as this model takes no videos", "send the frames as images")
    if IMAGE_PAD in tokens.image_token:
        return tokens.image_token.replace(IMAGE_PAD, tokens.video_token)
    return tokens.video_token


class SentVideo(VideoDecoderWrapper):
    """The frames of a `video:` string, decoded, in the place of a video file. An odd number gets its last one twice.

    Frames are uint8 [frames, height, width, 3]. Raises RequestError for what is no such string, or too large.
    """

    def __init__(self, payload: str):
        self._source = self._source_bytes = self._source_path = self._tmp_path = self._decoder = None
        header = SPAN.match(payload)
        pictures = split_pictures(_decoded(payload[header.end() if header else len(PREFIX) :]))
        span_s, self.fps = float(header[1]) if header else 0.0, FRAMES_PER_SECOND
        if span_s > MAX_SPAN_S:
            raise _not_a_video(f"{span_s:.0f} seconds")
        if span_s and len(pictures) > 1:
            self.fps = (len(pictures) - 1) / span_s
        frames = [_pixels(picture) for picture in pictures]
        self._frames = torch.stack(frames + frames[-1:] * (len(frames) % 2))

    def __len__(self):
        return len(self._frames)

    def __getitem__(self, idx):
        return self._frames[idx].numpy()

    @property
    def avg_fps(self) -> float:
        return self.fps

    @property
    def frame_shape(self) -> tuple[int, int]:
        return tuple(self._frames.shape[1:3])

    def get_frames_at(self, indices: list):
        return self._frames[indices].numpy()

    def get_frames_as_tensor(self, indices: list) -> torch.Tensor:
        return self._frames[indices]

    def close(self):
        self._frames = None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _not_a_video(f"{len(text)} characters that are not base64 ({error})") from None


def split_pictures(data: bytes) -> list[bytes]:
    """The PNG files that lie one behind the other in `data`, all of one size.

    Read from their headers, before anything is decoded. Raises RequestError naming what is wrong or too large.
    """
    starts, sizes, at = [0], [], 0
    while at < len(data):
        end, size = _end_and_size(data, at)
        sizes.append(size)
        starts.append(end)
        at = end
    pixels = sum(width * height for width, height in sizes)
    if not sizes or len(sizes) > MAX_FRAMES or pixels > MAX_PIXELS:
        raise _not_a_video(f"{len(sizes)} frames of {pixels} pixels together")
    if len(set(sizes)) > 1:
        raise _not_a_video(f"frames of {len(set(sizes))} sizes")
    return [data[start:stop] for start, stop in pairwise(starts)]


def _end_and_size(data: bytes, start: int) -> tuple[int, tuple[int, int]]:
    """Where the PNG at `start` ends, and its width and height."""
    at, kind = start + len(SIGNATURE), b""
    if data[start:at] != SIGNATURE or data[at + 4 : at + 8] != b"IHDR" or len(data) < at + 16:
        raise _not_a_video(f"{len(data)} bytes with no PNG at byte {start}")
    size = tuple(int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(2))
    while kind != b"IEND":
        if at + 12 > len(data):
            raise _not_a_video(f"{len(data)} bytes that end inside the PNG at byte {start}")
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
    if at > len(data) or 0 in size:
        raise _not_a_video(f"{len(data)} bytes with a damaged PNG at byte {start}")
    return at, size


def _pixels(picture: bytes) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    try:
        image = load_image(picture, False)[0].convert("RGB")
    except Exception as error:  # PIL raises SyntaxError, OSError, ValueError and zlib's
        raise _not_a_video(f"a PNG of {len(picture)} bytes that cannot be decoded ({error})") from None
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _not_a_video(given: str) -> RequestError:
    return RequestError(
        f"a {PREFIX} medium of {given}",
        f"the base64 of 1 to {MAX_FRAMES} PNG files of one size, as sgl.video makes it, of {MAX_PIXELS} pixels "
        f"together and spanning {MAX_SPAN_S} seconds at most",
        "ask sgl.video for fewer frames, or send the file itself as video_url or video_data",
    )
