"""What must be alike on all nodes, looked at before ranks load anything there."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from sglang_mm.cluster.placement import Placement
from sglang_mm.errors import ConfigError

PACKAGES = ("sglang_mm", "sglang", "torch", "triton")


def check_nodes(placement: Placement, model_path: str, deadline_s: float) -> None:
    """The same packages everywhere, and the checkpoint where it is a directory. Raises ConfigError naming the node."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    first_ranks = {node: rank for rank, node in reversed(list(enumerate(placement.nodes)))}
    look = ray.remote(num_cpus=0, max_retries=1)(facts)
    asked = {
        node: look.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, placement_group_bundle_index=rank)
        ).remote(model_path)
        for node, rank in first_ranks.items()
    }
    mine = facts(model_path)
    for node, reference in asked.items():
        try:
            theirs = ray.get(reference, timeout=deadline_s)
        except ray.exceptions.GetTimeoutError:
            given = f"node {node.name}, which started no Python within {deadline_s:.0f} s"
            raise ConfigError(given, "nodes that answer", "look at Ray's logs there") from None
        except ray.exceptions.RayError as error:
            given = f"node {node.name}, where sglang_mm cannot be used ({_last_line(error)})"
            raise ConfigError(given, "sglang_mm installed on every node", "install the same versions there") from None
        compare(node.name, mine, theirs, model_path)


def facts(model_path: str) -> dict[str, str]:
    """Of the machine this runs on."""
    found = {"Python": platform.python_version().rpartition(".")[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found | {"checkpoint": "there" if os.path.isfile(os.path.join(model_path, "config.json")) else "missing"}


def compare(name: str, mine: dict[str, str], theirs: dict[str, str], model_path: str) -> None:
    """Raises ConfigError. A checkpoint that is missing here too is one of the hub: every node fetches its own."""
    if theirs["checkpoint"] != mine["checkpoint"]:
        raise ConfigError(
            f"--model-path {model_path}, which is missing on node {name}",
            "a directory that every node sees at the same path, or a model id of the hub",
            "copy it there, or put it on a shared file system",
        )
    unlike = [f"{what} {theirs[what]} instead of {mine[what]}" for what in mine if theirs[what] != mine[what]]
    if unlike:
        raise ConfigError(
            f"node {name} has {', '.join(unlike)}", "the same versions on all nodes", "install them there, and again"
        )


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)
