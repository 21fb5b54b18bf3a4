"""Bad inputs, each under the words that docs/bad-input.md lists it by: requests to a server, and launches."""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
KV_TOKENS, VOCABULARY = 6000, 320
SERVER = ["--max-total-tokens", str(KV_TOKENS), "--media-url-max-file-size-mb", "1", "--cp-min-tokens", "64"]
ALLOWED_HOST = "127.0.0.1"
GREEDY = {"max_new_tokens": 4, "temperature": 0}
CHAT, GENERATE, COMPLETE = "/v1/chat/completions", "/generate", "/v1/completions"


@dataclass(frozen=True)
class Request:
    """what: as the table names it. body: sent as JSON to `path`. tells: what the message must contain besides."""

    what: str
    path: str
    body: dict
    tells: str = ""


def good_text() -> Request:
    return generate("a good request", "good enough " * 12)


def good_video(directory: Path) -> Request:
    return chat("a good video", [video(directory / "good.mp4"), TEXT])


def generate(what: str, text: str | None = "hello", tells: str = "", sampling=(), **fields) -> Request:
    body = {"sampling_params": GREEDY | dict(sampling), **fields}
    return Request(what, GENERATE, body if text is None else {"text": text, **body}, tells)


def chat(what: str, content, tells: str = "", **fields) -> Request:
    messages = [{"role": "user", "content": content}]
    body = {"model": "default", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
    return Request(what, CHAT, body, tells)


TEXT = {"type": "text", "text": "What moves?"}


def image(url) -> dict:
    return {"type": "image_url", "image_url": {"url": _url(url)}}


def video(url) -> dict:
    return {"type": "video_url", "video_url": {"url": _url(url)}}


def _url(name) -> str:
    return name.as_uri() if isinstance(name, Path) else name


def write_files(directory: Path) -> None:
    """Good and bad media in `directory`, which the server may read, and `secret.png` beside it, which it may not."""
    import av
    from PIL import Image

    from sglang_mm.tiny import write_video

    write_video(directory / "good.mp4", seconds=8)
    write_video(directory / "long.mp4", seconds=64, fps=2, width=112, height=112)
    write_video(directory / "one-frame.mp4", seconds=0.25)
    write_video(directory / "thin.mp4", seconds=2, width=16, height=4096)
    good = (directory / "good.mp4").read_bytes()
    (directory / "cut-off.mp4").write_bytes(good[: len(good) // 2])
    damaged = bytearray(good)
    damaged[2000:-3000:37] = bytes(byte ^ 0x5A for byte in damaged[2000:-3000:37])
    (directory / "damaged.mp4").write_bytes(damaged)
    (directory / "empty.mp4").write_bytes(b"")
    (directory / "noise.mp4").write_bytes(os.urandom(4096))
    with av.open(str(directory / "no-frames.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    picture = Image.new("RGB", (56, 56), (9, 99, 9))
    for path in (directory / "good.png", directory / "good.jpg", directory.parent / "secret.png"):
        picture.save(path)
    (directory / "cut-off.png").write_bytes((directory / "good.png").read_bytes()[:60])
    (directory / "link.png").symlink_to(directory.parent / "secret.png")
    Image.new("RGB", (1, 4000)).save(directory / "thin.png")


@contextmanager
def media_host() -> Iterator[str]:
    """An HTTP server whose media are missing (/gone), too large (/large) or never come (/slow). Yields its address."""
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow.mp4":
                ended.wait(30)
                return
            self.send_response(200 if self.path == "/large.mp4" else 404)
            self.end_headers()
            if self.path == "/large.mp4":
                self.wfile.write(bytes(1 << 21))

        def log_message(self, *_):
            pass

    host = ThreadingHTTPServer((ALLOWED_HOST, 0), Handler)
    Thread(target=host.serve_forever, daemon=True).start()
    try:
        yield f"http://{ALLOWED_HOST}:{host.server_port}"
    finally:
        ended.set()
        host.shutdown()
        host.server_close()


def requests_of(directory: Path, host: str) -> list[Request]:
    return [*files(directory), *addresses(directory, host), *markers(directory), *prompts(directory), *fields()]


def files(directory: Path) -> list[Request]:
    def shown(what: str, name: str, kind, tells: str = "") -> Request:
        return chat(what, [kind(directory / name), TEXT], tells)

    outside = directory.parent
    return [
        shown("video file that is not there", "gone.mp4", video, "is not there"),
        chat("the same as a bare path", [video(str(directory / "gone.mp4")), TEXT], "is not there"),
        shown("image file that is not there", "gone.png", image, "is not there"),
        shown("directory as video", ".", video, "is a directory"),
        shown("video of no bytes", "empty.mp4", video, "is empty"),
        shown("video file of random bytes", "noise.mp4", video, "no video format"),
        shown("video file cut off in the middle", "cut-off.mp4", video, "cut off"),
        shown("video file with damaged frames", "damaged.mp4", video, "damaged"),
        shown("video file without frames", "no-frames.mp4", video, "no video in it"),
        shown("video of a single frame", "one-frame.mp4", video, "1 frame"),
        shown("video of 16 x 4096 pixels", "thin.mp4", video, "aspect ratio"),
        shown("image as video", "good.png", video),
        shown("video as image", "good.mp4", image, "no image format"),
        shown("image file cut off", "cut-off.png", image, "truncated"),
        shown("image of 1 x 4000 pixels", "thin.png", image, "aspect ratio"),
        chat("file outside --allow-local-media", [image(outside / "secret.png"), TEXT], "--allow-local-media DIR"),
        chat("file that is not there outside it", [image(outside / "gone.png"), TEXT], "--allow-local-media DIR"),
        shown("symbolic link to a file outside it", "link.png", image, "--allow-local-media DIR"),
        generate("frames as a list of names", VIDEO, "a list of names",
                 video_data=[[str(outside / "secret.png")] * 2]),
    ]  # fmt: skip


def addresses(directory: Path, host: str) -> list[Request]:
    def shown(what: str, url: str, kind=image, tells: str = "") -> Request:
        return chat(what, [kind(url), TEXT], tells)

    cut = base64.b64encode((directory / "good.jpg").read_bytes()[:90]).decode()
    script = base64.b64encode(b"ffconcat version 1.0\nfile good.mp4\n").decode()
    return [
        shown("no address", ""),
        shown("ftp address", "ftp://127.0.0.1/x.mp4", video),
        shown("host not in --allowed-media-domains", "http://media.example/x.mp4", video, "--allowed-media-domains"),
        shown("address that answers 404", f"{host}/gone.mp4", video, "status 404"),
        shown("address where nobody listens", "http://127.0.0.1:9/x.mp4", video),
        shown("download larger than the limit", f"{host}/large.mp4", video, "--media-url-max-file-size-mb"),
        shown("download slower than the limit", f"{host}/slow.mp4", video, "REQUEST_TIMEOUT"),
        shown("base64 with other characters", "data:image/png;base64,@@@@", image, "not base64"),
        shown("data: address without data", "data:image/png", image, "comma"),
        shown("base64 of no video", "data:video/mp4;base64,AAAA", video),
        shown("play list that names a file", f"data:video/mp4;base64,{script}", video, "play list"),
        shown("frames of a program that are none", "video:/etc/passwd", video),
        generate("bare base64 of half a JPEG", IMAGE, image_data=[cut]),
    ]


def markers(directory: Path) -> list[Request]:
    png, mp4 = str(directory / "good.png"), str(directory / "good.mp4")
    return [
        generate("more images than markers", IMAGE, "1 image marker for 2 images", image_data=[png, png]),
        generate("more videos than markers", VIDEO, "1 video marker for 2 videos", video_data=[mp4, mp4]),
        generate("more markers than images", IMAGE * 2, "2 image markers for 1 image", image_data=[png]),
        generate("more markers than videos", VIDEO * 2, "2 video markers for 1 video", video_data=[mp4]),
        generate("video without a marker", "x", "0 video markers for 1 video", video_data=[mp4]),
        generate("video where an image's marker is", IMAGE, "1 image marker for 0 images", video_data=[mp4]),
        generate("markers without media", VIDEO, "video markers and no video"),
        generate("ids of markers without media", None, "image markers and no image", input_ids=[5, 268, 268, 6]),
        chat("marker in the text of a chat", [image(png), {"type": "text", "text": "a <|image_pad|> b"}],
             "2 image markers for 1 image"),
        chat("audio", [{"type": "audio_url", "audio_url": {"url": mp4}}, TEXT], "hears nothing"),
    ]  # fmt: skip


def prompts(directory: Path) -> list[Request]:
    fits = f"fewer than {KV_TOKENS // 64 * 64 - 6:,} tokens in a prompt, bound by the memory of 2 ranks"  # whole pages
    return [
        generate("text longer than fits", "a" * (KV_TOKENS + 1), fits),
        chat("video longer than fits", [video(directory / "long.mp4"), TEXT], fits),
        chat("videos that fit alone and not together", [*[video(directory / "good.mp4")] * 6, TEXT], fits),
        generate("answer longer than the context", sampling={"max_new_tokens": 10**9}, tells="1048576"),
        generate("empty text", ""),
        Request("empty prompt", COMPLETE, {"model": "default", "prompt": "", "max_tokens": 4}),
        generate("no prompt", None, "text, input_ids"),
        generate("ids that are negative", None, "0 to 319", input_ids=[5, -1]),
        generate("ids beyond the vocabulary", None, "0 to 319", input_ids=[5, VOCABULARY]),
    ]


def fields() -> list[Request]:
    """Most of these end an unguarded server: a rank raises, and SGLang goes down with it."""
    ask = partial(generate, text="good enough " * 12)
    return [
        ask("more log-probabilities than tokens", top_logprobs_num=10**6, return_logprob=True),
        Request("the same over OpenAI's API", COMPLETE, {"model": "default", "prompt": "x", "logprobs": 10**6}),
        ask("fewer than no log-probabilities", top_logprobs_num=-5, return_logprob=True),
        ask("log-probabilities from before the prompt", logprob_start_len=-7, return_logprob=True),
        ask("log-probabilities from behind the prompt", logprob_start_len=10**6, return_logprob=True),
        ask("log-probability of no token", token_ids_logprob=[10**6], return_logprob=True),
        ask("a billion answers", sampling={"n": 10**9}),
        ask("less than one answer", sampling={"n": 0}),
        ask("negative length of the answer", sampling={"max_new_tokens": -1}),
        ask("length of the answer in words", sampling={"max_new_tokens": "ten"}),
        ask("temperature in words", sampling={"temperature": "hot"}),
        ask("negative temperature", sampling={"temperature": -1}),
        ask("unknown sampling parameter", sampling={"temprature": 1}, tells="temprature"),
        ask("bias that leaves no token", sampling={"logit_bias": {"5": -1e308}, "temperature": 1}),
        ask("bias without tokens", sampling={"logit_bias": [1]}),
        ask("stop_regex that is none", sampling={"stop_regex": "(("}),
        ask("JSON schema that is none", sampling={"json_schema": "{"}),
        ask("embeddings over HTTP", positional_embed_overrides={"a": 1}),
        ask("session with unknown fields", session_params={"name": "x"}),
        ask("session that is not there", session_params={"id": "x"}),
        ask("LoRA adapter", lora_path="x"),
        ask("places outside the prompt", token_indices_to_pool=[10**6]),
        Request("chat without messages", CHAT, {"model": "default", "messages": []}),
    ]
