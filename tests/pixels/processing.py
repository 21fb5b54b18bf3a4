"""Our processor as SGLang's tokenizer manager makes it, without an engine around it."""

import asyncio
import base64
import io
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from sglang_mm import Engine  # before SGLang: it decides then on which platform it is
from sglang_mm.config import Config
from sglang_mm.serving.preflight import environment

MARKERS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}


@contextmanager
def processing(checkpoint: str, vision: str = "frames", config: dict | None = None, **launch):
    """Yields make(store): a processor whose pixels go there, or travel by value where it is None."""
    assert Engine
    with environment(Config(vision=vision, **launch)):
        from sglang.srt.runtime_context import publish, restore_context, snapshot_context
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils.hf_transformers_utils import get_config, get_processor

        from sglang_mm.serving import storing
        from sglang_mm.serving.processors.qwen2_5_vl import TimedQwenVLProcessor

        before, made = snapshot_context(), []
        args = ServerArgs(model_path=checkpoint, device="cpu", mm_process_config=config or {})
        publish(args, role="tokenizer")

        def make(store):
            storing._store = store
            pair = get_config(checkpoint, trust_remote_code=False), get_processor(checkpoint)
            made.append(TimedQwenVLProcessor(pair[0], args, pair[1], "default"))
            return made[-1]

        try:
            yield make
        finally:
            storing._store = None
            restore_context(before)
            for processor in made:
                processor.shutdown()


def request(images=(), videos=(), rid: str = "r1") -> SimpleNamespace:
    """What the tokenizer manager hands over; prompt: one marker per medium."""
    return SimpleNamespace(
        rid=rid,
        image_data=list(images),
        video_data=list(videos),
        audio_data=None,
        text="".join([MARKERS["image"]] * len(images) + [MARKERS["video"]] * len(videos)) + "What is it?",
    )


def processed(processor, asked):
    """SGLang's MultimodalProcessorOutput."""
    return asyncio.run(processor.process_mm_data_async(asked.image_data, asked.text, asked))


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> bytes:
    """A PNG of noise, so that no two values are alike by chance."""
    from PIL import Image

    depth = len(mode)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, depth), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise.squeeze() if depth == 1 else noise, mode).save(written, "PNG")
    return written.getvalue()


def sent_video(count: int, height: int, width: int) -> str:
    """What `sgl.video` sends."""
    return "video:" + base64.b64encode(b"".join(picture(height, width, seed=i) for i in range(count))).decode()
