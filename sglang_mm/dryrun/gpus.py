"""How much memory a GPU has, and how much of it a rank may plan with."""

import re
from dataclasses import dataclass

from sglang_mm.errors import ConfigError

GIB = 1 << 30
RUNTIME = 2 * GIB
"""Kept for what no table knows: CUDA's context, NCCL's buffers, workspaces of libraries. Assumed, not measured."""
MIB = {"a100": 81920, "h100": 81559, "h200": 143771, "b200": 183359, "l40s": 46068}
"""Of one device, as nvidia-smi shows it."""


@dataclass(frozen=True)
class Gpu:
    """bytes: of all its memory."""

    name: str
    bytes: int

    @property
    def usable(self) -> int:
        return self.bytes - RUNTIME


GPUS = {name: Gpu(name, mib << 20) for name, mib in MIB.items()}


def parse_gpu(text: str) -> Gpu:
    """A name, or gigabytes (10^9) as in 80 or 80GB. Raises ConfigError for anything else."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    found = re.fullmatch(r"(\d{1,5}(?:\.\d{1,3})?)(?:gb?)?", text.lower())
    if not found or float(found[1]) * 1e9 <= RUNTIME:
        allowed = f"{' | '.join(GPUS)}, or gigabytes above {RUNTIME / 1e9:.1f}"
        raise ConfigError(f"--gpu {text}", allowed, "pass the name of a GPU, or its memory, as in --gpu 80")
    return Gpu(f"GPU of {found[1]} GB", int(float(found[1]) * 1e9))
