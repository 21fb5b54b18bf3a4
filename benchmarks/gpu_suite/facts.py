"""What the figures were measured with: device, driver, libraries, commit, date; and what was not there."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "torch", "triton", "flashinfer-python", "flash-attn-4", "flash-attn-3", "flash-attn", "sglang", "sglang-kernel",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy", "msgspec",
)  # fmt: skip
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Facts:
    """memory_gb: of the device, 1e9 bytes. libraries: distribution -> version, of those that are installed."""

    device: str
    capability: str
    processors: int
    memory_gb: float
    l2_mb: float
    driver: str
    cuda: str
    python: str
    libraries: dict[str, str]
    absent: tuple[str, ...]
    commit: str
    date: str

    @property
    def slug(self) -> str:
        """The device as part of a file's name."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.device.lower()).split())


def gather_facts(device: torch.device, commit: str | None = None) -> Facts:
    """commit: of a copy of the tree without its history."""
    installed = {name: _version(name) for name in LIBRARIES}
    found = {
        "device": platform.processor() or platform.machine(),
        "capability": "none",
        "processors": torch.get_num_threads(),
        "memory_gb": 0.0,
        "l2_mb": 0.0,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        }
    return Facts(
        **found,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=str(torch.version.cuda),
        python=platform.python_version(),
        libraries={name: found for name, found in installed.items() if found},
        absent=tuple(name for name, found in installed.items() if not found),
        commit=commit or _commit(),
        date=date.today().isoformat(),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """With a plus sign where files differ from it."""
    commit = _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    is_changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no") != UNKNOWN
    return f"{commit}+" if commit != UNKNOWN and is_changed else commit


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else UNKNOWN
