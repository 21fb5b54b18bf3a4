"""What a backend is asked to do, as far as that decides whether it can: device, dtype, heads, sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.types import TileProgram


@dataclass(frozen=True)
class Problem:
    """capability: of a CUDA device, 90 for sm_90; 0 on CPU. rows, keys: of the shards; the others: of the program."""

    device: torch.device
    capability: int
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    keys: int
    items: int
    entries: int
    full_entries: int = 0

    @property
    def name(self) -> str:
        return f"sm_{self.capability}" if self.capability else str(self.device)


def problem_of(q_THD: Tensor, k_KHD: Tensor, program: TileProgram | None = None) -> Problem:
    """Never waits for the device. program: None where its size does not matter."""
    return Problem(
        device=q_THD.device,
        capability=capability_of(q_THD.device),
        dtype=q_THD.dtype,
        heads=q_THD.shape[1],
        kv_heads=k_KHD.shape[1],
        head_dim=q_THD.shape[2],
        rows=len(q_THD),
        keys=len(k_KHD),
        items=program.items if program else 0,
        entries=program.entries if program else 0,
        full_entries=len(program.full_tile) if program else 0,
    )


def capability_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
