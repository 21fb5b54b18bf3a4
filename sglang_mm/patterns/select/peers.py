"""The ranks that share one prompt, as the selection needs them: two collectives. No transport is known here."""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """One rank's view. All ranks make the same calls, in one order, with tensors of one shape and dtype."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on all of them. `tensor` may be overwritten."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """[C, ...]: every rank's tensor, in order of ranks."""
        ...


class Alone:
    """One rank that holds everything."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)
