"""The class behind platform.activate(); a file of its own because it cannot be defined before sglang is imported."""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class CpuReferencePlatform(CpuDeviceMixin, SRTPlatform):
    """In-tree CPU device operations without the compiled CPU kernels, which the PyPI wheels do not carry."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False
