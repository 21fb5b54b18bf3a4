"""Bytes to the floats that a vision tower is fed, as transformers' image and video processors make them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scaling:
    """mean, std: one number per channel, on the scale of pixels from 0 to 1. factor: what bytes are multiplied by.

    rescale, normalize: whether each is done at all, as in a processor's do_rescale and do_normalize.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: float
    rescale: bool = True
    normalize: bool = True

    def floats(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 [n, channels * rest] -> float32 of that shape, on the same device; bit-equal to transformers'.

        Its order of operations, which decides the last bits: the factor goes into mean and std, then one subtraction
        and one division.
        """
        if not self.normalize:
            return patches * self.factor if self.rescale else patches.float()
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        if self.rescale:
            mean, std = mean * (1.0 / self.factor), std * (1.0 / self.factor)
        channels = patches.reshape(len(patches), len(self.mean), -1).to(torch.float32, copy=True)
        mean, std = (numbers.to(patches.device)[:, None] for numbers in (mean, std))
        return channels.sub_(mean).div_(std).view(patches.shape)
