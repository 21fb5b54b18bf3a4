"""What `--sparse` chose, as each process needs it: the plan or the online rule, for the heads of this rank; the key
under which sparsely computed K/V are cached.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.kernels.problem import Problem, capability_of
from sglang_mm.kernels.selector import choose_backend
from sglang_mm.patterns.boundary import HeadPlan
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.plan import Model, Plan
from sglang_mm.patterns.plan_file import load
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import Report, auto_select, select
from sglang_mm.patterns.select.held import Heads
from sglang_mm.patterns.select.peers import Peers

KNOWN_PLAN = "sglang_mm_plan.json"  # in a checkpoint's folder: the plan that was found for it
KEY = "sglang_mm:"  # begins our part of a prefix-cache key


def with_known_plan(config: Config, model_path: str) -> Config:
    """`auto` becomes the plan in the checkpoint's folder, where model_path is one and has it."""
    path = Path(model_path) / KNOWN_PLAN
    return replace(config, sparse=str(path)) if config.sparse == "auto" and path.is_file() else config


@lru_cache
def plan_of(sparse: str) -> Plan | None:
    """The plan in the file that --sparse names; None for `off` and `auto`. Raises ConfigError."""
    return None if sparse in ("off", "auto") else load(sparse)


def check_plan(config: Config, model: Model) -> None:
    """Raises ConfigError for a plan of another model, or one that T ranks cannot split."""
    plan = plan_of(config.sparse)
    if plan is None:
        return
    try:
        plan.require(model)
    except ConfigError as error:
        raise ConfigError(f"--sparse {config.sparse}: {error.given}", error.allowed, error.remedy) from error
    shares = any(group.group is not None for layer in plan.layers for group in layer.groups)
    if shares and config.tp > model.kv_heads and model.group > 1:
        raise ConfigError(
            f"--tp {config.tp} with a plan whose heads share a selection by K/V head, of which there are "
            f"{model.kv_heads}",
            f"--tp up to {model.kv_heads}, or a plan for each head",
            "lower --tp, and raise --cp to use the same devices",
        )


def tile_backend(
    config: Config, device: torch.device | str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> str:
    """What will run tile programs of common size. Raises ConfigError for a --kernel-backend that cannot."""
    device = torch.device(device)
    sizes = {"rows": 1, "keys": 1, "items": 1, "entries": 1, "full_entries": 1}
    problem = Problem(device, capability_of(device), dtype, heads, kv_heads, head_dim, **sizes)
    try:
        return choose_backend(problem, config.kernel_backend).backend
    except ConfigError as error:
        raise ConfigError(
            f"--kernel-backend {config.kernel_backend}: {error.given}", error.allowed, "pass --kernel-backend auto"
        ) from error


def title(config: Config) -> str:
    """For people and records: `off`, `auto`, or name and digest of the plan."""
    plan = plan_of(config.sparse)
    return config.sparse if plan is None else f"{Path(config.sparse).name} {plan.digest()}"


def cache_key(config: Config) -> str | None:
    """What prefix-cache keys of sparse requests have in them: K/V of one plan or vision mode serve no other.

    None with --sparse off: dense K/V keep SGLang's own keys.
    """
    if config.sparse == "off":
        return None
    plan = plan_of(config.sparse)
    return f"{KEY}{config.sparse if plan is None else plan.digest()}:{config.vision}"


def is_sparse(extra_key: str | None, own: str | None) -> bool:
    """Whether a request with this key is to be computed sparsely. own: this server's `cache_key`."""
    return own is not None and (extra_key or "").endswith(own)


class SparseMethod:
    """Of one rank: heads [first, first + heads) of the model are its own, `group` of them per K/V head."""

    def __init__(self, config: Config, first: int, heads: int, group: int):
        self.title, self.backend = title(config), config.kernel_backend
        self._plan, self.first, self.heads, self.group = plan_of(config.sparse), first, heads, group

    def select(
        self, layer: int, q_THD: Tensor, k_KGD: Tensor, rows: Shard, keys: Shard, *, scale: float, peers: Peers,
        chunk: range, previous,
    ) -> tuple[Selection, Report]:  # fmt: skip
        """As patterns.select; heads are numbered from this rank's first. Collective over the ring."""
        given = {"scale": scale, "peers": peers, "chunk": chunk, "previous": previous}
        if self._plan is None:
            units = [(head,) for head in range(self.heads)]
            return auto_select(units, layer, q_THD, k_KGD, rows, keys, **given)
        planned = self._units(layer)
        name = f"selection of layer {layer}"
        return select(planned, q_THD, k_KGD, rows, keys, theta=self._plan.theta, title=name, **given)

    def _units(self, layer: int) -> list[tuple[Heads, HeadPlan]]:
        """check_plan has seen that a unit lies on one rank."""
        mine, first = range(self.first, self.first + self.heads), self.first
        units = self._plan.units(layer)
        return [(tuple(head - first for head in heads), plan) for heads, plan in units if heads[0] in mine]
