"""How often code calls torch, and how often it would wait for a GPU: for a size or a value that only the device knows.

Tensors here are on the CPU, so waits are told by what is called.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Operations of torch with a result, or a size of it, that the host has to ask for."""
TO_HOST = {"tolist", "cpu", "numpy"}
"""Methods that copy to the host; on the CPU no operation tells of them."""


@dataclass
class Counts:
    """calls: operations of torch, views among them, and tensors made from numbers of the host."""

    calls: int = 0
    waits: int = 0


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        of_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        self.counts.calls += 1
        self.counts.waits += name in WAITING or of_unknown_size or _has_mask(name, args)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.counts.waits += name in TO_HOST
        self.counts.calls += name == "tensor"
        return func(*args, **(kwargs or {}))


def _has_mask(name: str, args) -> bool:
    masks = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(each is not None and each.dtype == torch.bool for each in masks)


def count(run: Callable) -> tuple[object, Counts]:
    """What `run` returns, and what it called."""
    counts = Counts()
    with _Methods(counts), _Operations(counts):
        return run(), counts
