"""How much of everything is run: in full, quickly, or as a rehearsal on a CPU."""

from dataclasses import dataclass

import torch

from benchmarks.gpu_suite.prompts import FRAME

K = 1024


@dataclass(frozen=True)
class Point:
    """A prompt length and the heads of a layer that is timed there."""

    tokens: int
    heads: int = 28
    kv_heads: int = 4

    @property
    def name(self) -> str:
        size = f"{self.tokens // K // K}M" if self.tokens % (K * K) == 0 else f"{self.tokens / K:g}K"
        return f"{size} tokens, {self.heads}/{self.kv_heads} heads"


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder; by default that of Qwen2.5-VL-7B. chunk: rows of its linear layers at once."""

    layers: int = 28
    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    mlp: int = 18944
    chunk: int = 32 * K

    @property
    def weights(self) -> int:
        """Of one layer's linear maps."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.mlp


@dataclass(frozen=True)
class Sizes:
    """seconds: the budget. points: of the sparse step, shortest first; at 32K it shall not be slower than dense.
    repeat_s: how long one figure is measured. check_all: head dims and groups in every dtype, not in `dtype` alone.
    """

    name: str
    seconds: float
    points: tuple[Point, ...]
    shares: tuple[float, ...] = (0.02, 0.05, 0.10)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    frame: tuple[int, int] = FRAME
    repeat_s: float = 0.5

    check_dims: tuple[int, ...] = (64, 80, 96, 128)
    check_groups: tuple[int, ...] = (1, 4, 7, 8)
    check_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    check_frames: int = 14
    check_all: bool = True

    copy_mb: int = 4096
    matmul: int = 8192
    widths: tuple[int, ...] = (1, 2, 4, 8)
    ring: tuple[Point, ...] = (Point(128 * K), Point(1024 * K))
    decoder: Decoder = Decoder()
    model_tokens: tuple[int, ...] = (64 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
    decode: tuple[Point, ...] = (Point(128 * K), Point(1024 * K))


FULL = Sizes("full", 3600, tuple(Point(size * K) for size in (32, 64, 128, 256, 512, 1024)))

QUICK = Sizes(
    "quick",
    440,
    (Point(32 * K), Point(64 * K), Point(128 * K), Point(1024 * K)),
    repeat_s=0.2,
    check_all=False,
    ring=(Point(128 * K),),
    model_tokens=(64 * K, 128 * K, 1024 * K),
    decode=(Point(128 * K),),
)

REHEARSAL = Sizes(
    "rehearsal",
    600,
    (Point(384, heads=7, kv_heads=1), Point(640, heads=4, kv_heads=2)),
    shares=(0.1, 0.5),
    head_dim=16,
    dtype=torch.float32,
    frame=(3, 4),
    repeat_s=0.0,
    check_dims=(16,),
    check_groups=(1, 2),
    check_dtypes=(torch.float32, torch.bfloat16),
    check_frames=3,
    copy_mb=1,
    matmul=64,
    widths=(1, 2),
    ring=(Point(1200, heads=4, kv_heads=2),),
    decoder=Decoder(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=128, chunk=256),
    model_tokens=(256, 384, 512),
    decode=(Point(512, heads=4, kv_heads=2),),
)
"""Toy sizes: every step once, on a CPU, with the reference. Its figures mean nothing."""
