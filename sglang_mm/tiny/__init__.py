"""A tiny Qwen2.5-VL checkpoint and a tiny video: real files for tests, demos and first steps, made in seconds."""

from sglang_mm.tiny.checkpoint import write_checkpoint
from sglang_mm.tiny.planted import planted_heads
from sglang_mm.tiny.video import write_video

__all__ = ["planted_heads", "write_checkpoint", "write_video"]
