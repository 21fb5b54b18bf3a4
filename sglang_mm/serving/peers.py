"""The ranks of a ring as a selection needs them: patterns.select.peers.Peers over a Transport."""

import torch
from torch import Tensor

from sglang_mm.parallel.transport import Transport


class RingPeers:
    """Collectives of all ranks of the ring; each wait ends by the transport's deadline."""

    def __init__(self, transport: Transport):
        self.rank, self.size, self._transport = transport.rank, transport.size, transport

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else self._transport.sum_(tensor, "selection", "selection")

    def gather(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        counts = [flat.numel()] * self.size
        parts = self._transport.all_to_all([flat] * self.size, counts, "selection", kind="selection")
        return torch.stack([part.view_as(tensor) for part in parts])
