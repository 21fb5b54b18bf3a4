"""Which rank runs where: the ranks of one node together, in the order of the ring, rank 0 beside this process.

claim    N bundles of G GPUs, each on a node of its own, the first here: Ray finds the nodes, or grows the cluster
pin      N x G bundles of one GPU, in ring order, on those nodes: what SGLang puts its actors on
"""

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_mm.cluster.connection import Cluster
from sglang_mm.errors import ConfigError

TELL_EVERY_S = 10.0
LOOK_EVERY_S = 1.0
PIN_S = 10.0
NODE_ID = "ray.io/node-id"
NEAR = ("ray.io/region", "ray.io/availability-zone")  # labels, where set: nodes that share them are put side by side


@dataclass(frozen=True)
class Node:
    """name: as people know it. host: its address. node_id: Ray's."""

    name: str
    host: str
    node_id: str


@dataclass(frozen=True)
class Placement:
    """group: Ray's placement group, one bundle per rank. nodes: of every rank, in the order of ranks."""

    group: Any
    nodes: tuple[Node, ...]

    @property
    def names(self) -> list[str]:
        """Of the nodes, each once, in ring order."""
        return list(dict.fromkeys(node.name for node in self.nodes))

    def release(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


def place(
    cluster: Cluster, nodes: int, ranks_per_node: int, deadline_s: float, say: Callable[[str], None]
) -> Placement:
    """Room for ranks_per_node ranks on each of `nodes` nodes, one GPU a rank. say: told what is still missing.

    Raises ConfigError, with what the cluster has, when there is no such room within deadline_s.
    """
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    asked, until = Asked(cluster, nodes, ranks_per_node, deadline_s), time.monotonic() + deadline_s
    asked.check_here()
    here = {NODE_ID: cluster.node_id}
    while True:
        claim = placement_group(
            [{"GPU": ranks_per_node}] * nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[here] + [{}] * (nodes - 1),
        )
        try:
            asked.wait_for(claim, until, say)  # or raises, which ends this loop
            bundles = placement_group_table(claim)["bundles_to_node_id"]
        finally:
            remove_placement_group(claim)
        found = in_ring_order([bundles[bundle] for bundle in range(nodes)])
        places = tuple(node for node in found for _ in range(ranks_per_node))
        pins = [{NODE_ID: node.node_id} for node in places]
        group = placement_group([{"GPU": 1}] * len(places), strategy="PACK", bundle_label_selector=pins)
        if group.wait(PIN_S):
            return Placement(group, places)
        remove_placement_group(group)  # somebody was faster: other nodes may have room


def in_ring_order(node_ids: list[str]) -> list[Node]:
    """The first stays first; of the others, those in its zone and region come first, then by address."""
    import ray

    listed = {node["NodeID"]: node for node in ray.nodes()}
    first, *others = (listed[node_id] for node_id in node_ids)

    def far(node: dict) -> tuple:
        labels, of_first = node.get("Labels", {}), first.get("Labels", {})
        apart = tuple((labels.get(key, "") != of_first.get(key, ""), labels.get(key, "")) for key in NEAR)
        return (*apart, _sortable(node["NodeManagerAddress"]), node["NodeName"])

    return [_node(each) for each in (first, *sorted(others, key=far))]


def _sortable(host: str) -> tuple:
    """10.0.0.9 before 10.0.0.10."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return (9, 0, host)
    return (address.version, int(address), host)


def _node(listed: dict) -> Node:
    """Ray names a node by its address unless told otherwise."""
    name, host = listed["NodeName"], listed["NodeManagerAddress"]
    return Node(listed["NodeManagerHostname"] if name == host else name, host, listed["NodeID"])


@dataclass(frozen=True)
class Asked:
    """What was asked of the cluster, for messages."""

    cluster: Cluster
    nodes: int
    ranks_per_node: int
    deadline_s: float

    def check_here(self) -> None:
        """Rank 0 shares sockets of the file system with this process."""
        import ray

        here = next(node for node in ray.nodes() if node["NodeID"] == self.cluster.node_id)
        if here["Resources"].get("GPU", 0) < self.ranks_per_node:
            raise ConfigError(
                f"{self} on {_gpus(here)}, where this runs",
                f"a first node, beside this process, with {self.ranks_per_node}: rank 0 serves from there",
                "run this on such a node (`ray job submit` has --entrypoint-resources), or pass more --nodes; on CPU, "
                "say how many ranks a node takes (`ray start --num-gpus`)",
            )

    def wait_for(self, group, until: float, say: Callable[[str], None]) -> None:
        began = told = time.monotonic()
        while not group.wait(LOOK_EVERY_S):
            now = time.monotonic()
            if now > until:
                raise ConfigError(
                    f"{self}, for which {self.deadline_s:.0f} s brought no room: {self._there()}",
                    f"{self.nodes} nodes with {self.ranks_per_node} free GPUs each, this one among them",
                    "add nodes, end what holds their GPUs, lower --cp or --nodes, or raise --nodes-deadline",
                )
            if now - told >= TELL_EVERY_S:
                told = now
                say(f"waiting for room, {now - began:.0f} s of {self.deadline_s:.0f} s: {self} needs "
                    f"{self.ranks_per_node} free GPUs on each; {self._there()}")  # fmt: skip

    def __str__(self) -> str:
        return f"--nodes {self.nodes} with {self.ranks_per_node} ranks a node"

    def _there(self) -> str:
        import ray

        listed = ", ".join(_gpus(node) for node in ray.nodes() if node["Alive"])
        return f"the cluster has {listed}; {ray.available_resources().get('GPU', 0):g} GPUs in all are free"


def _gpus(listed: dict) -> str:
    return f"{_node(listed).name} ({listed['NodeManagerAddress']}) with {listed['Resources'].get('GPU', 0):g} GPUs"
