"""`sgl.RuntimeEndpoint` for programs, with what SGLang 0.5.23's client keeps to itself.

    sgl.set_default_backend(sglang_mm.serving.endpoint.RuntimeEndpoint(url))

SGLang's own serves programs with one image or video each. This one sends several, tells the server how many seconds a
`sgl.video` spans, and takes the chat template from the model's type where its path does not say it.
"""

from functools import lru_cache

from sglang.lang.backend import runtime_endpoint as stock
from sglang.lang.chat_template import get_chat_template

TEMPLATES = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2-vl"}  # SGLang's names, by model type
PREFIX = "video:"


class RuntimeEndpoint(stock.RuntimeEndpoint):
    """The address of a server as the backend of programs; arguments are SGLang's."""

    def __init__(self, base_url: str, *args, chat_template_name: str | None = None, **kwargs):
        super().__init__(base_url, *args, chat_template_name=chat_template_name, **kwargs)
        found = TEMPLATES.get(self.model_info.get("model_type"))
        if found and self.chat_template.name == "default" and chat_template_name is None:
            self.chat_template = get_chat_template(found)

    def _add_images(self, s, data: dict) -> None:
        """Add what the program has shown so far to a request; a batch shows all of it with each of its prompts."""
        if not s.images_ or "input_ids" in data:  # ids are choices, scored without their prompt
            return
        media = [_with_span(path, encoded) for path, encoded in s.images_]
        data["image_data"] = [media] * len(data["text"]) if isinstance(data["text"], list) else media


def _with_span(path, encoded: str) -> str:
    if not encoded.startswith(PREFIX):
        return encoded
    span_s = _span_s(path)
    return f"{PREFIX}span={span_s:.6f};{encoded[len(PREFIX) :]}" if span_s > 0 else encoded


@lru_cache(maxsize=1024)
def _span_s(path: str) -> float:
    """Seconds from a video's first frame to its last one, which sgl.video sends both; 0 if the file does not say."""
    import cv2  # by which sgl.video has read the file

    capture = cv2.VideoCapture(path)
    try:
        rate, frames = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return max(frames - 1, 0) / rate if rate > 0 else 0.0
    finally:
        capture.release()
