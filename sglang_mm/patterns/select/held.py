"""What one rank holds of one layer of one prompt, and which query heads are scored together.

T rows and K keys of this rank, H query heads, G K/V heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import probe
from sglang_mm.kernels.merge import state_dtype
from sglang_mm.kernels.probe import Slots
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.peers import Peers
from sglang_mm.types import TokenMap

Heads = tuple[int, ...]
"""Query heads of one K/V group that share a selection."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Held:
    """q_THD [T, H, D], k_KGD [K, G, D]: floats of one dtype, on the device of the shards, whose tokens they belong to.

    chunk: the prompt's rows that are computed now, on all ranks together; no key lies after its end.
    Raises ConfigError for what does not fit.
    """

    q_THD: Tensor
    k_KGD: Tensor
    rows: Shard
    keys: Shard
    scale: float
    peers: Peers
    chunk: range

    def __post_init__(self):
        q, k = tuple(self.q_THD.shape), tuple(self.k_KGD.shape)
        given = f"q {q} {self.q_THD.dtype}, k {k} {self.k_KGD.dtype}"
        if self.q_THD.dtype not in FLOATS:
            raise ConfigError(given, f"one of {FLOATS}", "pass q and k before they are quantised")
        of_heads = len(q) == len(k) == 3 and q[2] == k[2] > 0 and k[1] > 0 and q[1] > 0 == q[1] % k[1]
        if not of_heads or self.q_THD.dtype != self.k_KGD.dtype:
            allowed = "q [T,H,D], k [K,G,D] of one dtype, H a multiple of G, H and G and D at least 1"
            raise ConfigError(given, allowed, "check the head split")
        for name, shard, tensors, first in (("q", self.rows, q, self.chunk.start), ("k", self.keys, k, 0)):
            at = shard.positions
            inside = not len(at) or (int(at[0]) >= first and int(at[-1]) < self.chunk.stop)
            if len(at) != tensors[0] or not inside:
                given = f"{name} of {tensors[0]} tokens at {len(at)} positions {at[:2].tolist()} .. {at[-2:].tolist()}"
                raise ConfigError(given, f"as many, in {first} .. {self.chunk.stop - 1}", "check shard and chunk")

    @property
    def tokens(self) -> TokenMap:
        return self.keys.tokens

    @property
    def pos_q(self) -> Tensor:
        return self.rows.positions

    @property
    def pos_k(self) -> Tensor:
        return self.keys.positions

    @property
    def group(self) -> int:
        """Query heads per K/V head."""
        return self.q_THD.shape[1] // self.k_KGD.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of scores and masses: fp64 for fp64 inputs, else fp32."""
        return state_dtype(self.q_THD.dtype)

    @property
    def device(self) -> torch.device:
        return self.q_THD.device


def check_units(units: Sequence[Heads], held: Held) -> None:
    """Raises ConfigError for no unit, a unit without heads or over two K/V heads, and a head that is none or twice."""
    for heads in units:
        if len({head // held.group for head in heads}) != 1:
            raise ConfigError(f"a unit of heads {heads}", f"heads of one group of {held.group}", "split the unit")
    named = sorted(head for heads in units for head in heads)
    if not named or len(set(named)) != len(named) or named[0] < 0 or named[-1] >= held.q_THD.shape[1]:
        allowed = f"one unit or more, each of heads 0 .. {held.q_THD.shape[1] - 1} at most once"
        raise ConfigError(f"units of heads {named}", allowed, "check them")


def make_slots(units: Sequence[Heads], held: Held) -> Slots:
    """Raises ConfigError as `check_units`."""
    check_units(units, held)
    return probe.make_slots(units, held.group, held.q_THD)
