"""Ranks as SGLang's own Ray actors, on the nodes of a cluster: what its RayEngine needs to be told for that.

RayEngine makes the actors, hands them their arguments and waits for them. It is told here with which environment they
start, and where; afterwards it is checked that our plugin is live in each, and watched that none ends unseen.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sglang_mm.cluster import Cluster, Placement, check_nodes, connected, place, reason_of, watch
from sglang_mm.config import Config
from sglang_mm.errors import SelfCheckError
from sglang_mm.serving.ray_worker import KEEP_DEVICES, NODE
from sglang_mm.serving.selfcheck import check_ray

logger = logging.getLogger(__name__)
PASSED_ON = ("SGLANG", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "HF_", "OMP_", "CUDA_", "UCX_")
NOT_PASSED_ON = ("CUDA_VISIBLE_DEVICES",)  # of this node
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")  # last words of names
BUNDLE = re.compile(r"_bundle(\d+)\b")  # in the name that RayEngine gives an actor: our bundles are numbered as ranks


@dataclass(frozen=True)
class Nodes:
    """The cluster, and where each rank runs on it.

    leave: gives the places back and disconnects. It must come before the children of this process are ended, for the
    daemons of simulated nodes are among them and Ray's client waits a minute for them. May be called more than once.
    """

    cluster: Cluster
    placement: Placement
    leave: Callable[[], None]

    def __str__(self) -> str:
        each = len(self.placement.nodes) // len(self.placement.names)
        return f"{', '.join(self.placement.names)}: {each} rank{'s' * (each > 1)} each; {self.cluster}"


@contextmanager
def nodes_for(config: Config, model_path: str, *, on_cpu: bool, say: Callable[[str], None]) -> Iterator[Nodes | None]:
    """Room for all ranks on a cluster, given back on leaving; None where ranks are processes of this machine.

    say: told while it waits. Raises ConfigError.
    """
    if not config.uses_ray:
        yield None
        return
    each = config.world_size // config.nodes
    with ExitStack() as until_the_end:
        cluster = until_the_end.enter_context(
            connected(config.ray_address, config.nodes, each, may_simulate=on_cpu or config.nodes == 1)
        )
        placement = place(cluster, config.nodes, each, config.nodes_deadline_s, say)
        until_the_end.callback(placement.release)
        check_nodes(placement, model_path, config.nodes_deadline_s)
        yield Nodes(cluster, placement, until_the_end.close)


class ActorsWithEnvironment:
    """In the place of SGLang's actor class: the same actors, started in our environment."""

    def __init__(self, actor_class, placement: Placement):
        self.actor_class, self.placement = actor_class, placement

    def options(self, *, scheduling_strategy, **options):
        rank = scheduling_strategy.placement_group_bundle_index
        variables = environment_of_ranks() | {NODE: self.placement.nodes[rank].name}
        return self.actor_class.options(
            scheduling_strategy=scheduling_strategy, runtime_env={"env_vars": variables}, **options
        )


def environment_of_ranks() -> dict[str, str]:
    """What workers inherit on one machine, and Ray's do not: our configuration, and settings of the libraries.

    Ray shows it to whoever may look at the cluster, so nothing secret is in it.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and name not in NOT_PASSED_ON and name.rpartition("_")[2] not in SECRET
    }
    return passed | {KEEP_DEVICES: "1"}


@contextmanager
def actors_in_our_environment(placement: Placement) -> Iterator[None]:
    """While RayEngine makes its actors."""
    from sglang.srt.ray import engine

    stock = engine.SchedulerActor
    engine.SchedulerActor = ActorsWithEnvironment(stock, placement)
    try:
        yield
    finally:
        engine.SchedulerActor = stock


def launch_actors(launch: Callable, nodes: Nodes, lost: Callable, server_args, port_args, run_scheduler_process_func):
    """RayEngine's _launch_scheduler_processes, and what it lacks: ranks that are surely ours, and where they should be.

    lost(rank, reason): told of a rank that ends while it loads. Raises SelfCheckError.
    """
    check_ray()
    with actors_in_our_environment(nodes.placement):
        try:
            result, processes = launch(
                server_args, port_args, run_scheduler_process_func, placement_group=nodes.placement.group
            )
        except RuntimeError as error:
            if died := BUNDLE.search(str(error)):
                rank = int(died[1])
                node = nodes.placement.nodes[rank].name
                lost(rank, f"its Ray actor on node {node} ended while it loaded: {reason_of(error)}")
            raise
    without = [rank for rank, info in enumerate(result.scheduler_infos) if "sglang_mm" not in info]
    if without:
        raise SelfCheckError(f"sglang_mm is not live in ranks {without}. Install it in the Python of every node.")
    for rank, (info, node) in enumerate(zip(result.scheduler_infos, nodes.placement.nodes, strict=True)):
        if info["sglang_mm"]["ray_node"] != node.node_id:
            raise SelfCheckError(f"rank {rank} is not on node {node.name}. Remedy: unset SGLANG_RAY_BUNDLE_INDICES.")
    return result, processes


def watch_actors(result, nodes: Nodes, lost: Callable[[int, str], None]) -> Callable[[], None]:
    """Tell `lost` of every rank whose actor ends; the returned function ends the watch."""

    def tell(rank: int, reason: str) -> None:
        name = nodes.placement.nodes[rank].name
        lost(rank, f"its Ray actor on node {name} ended: {reason}")

    return watch(result.scheduler_actors, tell)
