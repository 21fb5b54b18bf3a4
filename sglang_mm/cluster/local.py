"""Nodes that are simulated on this machine: one Ray daemon each, all of them on loopback alone.

What a cluster does can so be tried and tested without one. Ranks get no faster by it, and GPUs cannot be shared out so.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_mm.errors import ConfigError

LOOPBACK = "127.0.0.1"
STORE_BYTES = 80 << 20  # Ray's object store holds nothing of ours: the least that Ray takes
# Ray reads its own when it is imported: the first keeps it to loopback. The last does that for ranks
SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ENVIRONMENT = {SWITCH: "0", "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo"}
_stays = False  # once it is known, whatever the environment becomes: Ray has read it


@contextmanager
def simulated(nodes: int, ranks_per_node: int, *, dashboard_port: int | None = None) -> Iterator["LocalCluster"]:
    """A cluster of that many nodes with room for that many ranks each; ended, with its files, on leaving.

    dashboard_port: where Ray's dashboard and its job server listen; none by default. Raises ConfigError when ray was
    imported before, with an environment in which it would listen to the world.
    """
    cluster = LocalCluster(ranks_per_node, dashboard_port)
    try:
        for _ in range(nodes):
            cluster.add_node()
        yield cluster
    finally:
        cluster.close()


class LocalCluster:
    """address: for `ray.init`. environment: what processes must have that connect to it."""

    environment = ENVIRONMENT

    def __init__(self, ranks_per_node: int, dashboard_port: int | None = None):
        stay_on_loopback()
        from ray.cluster_utils import Cluster

        self._ranks, self._dashboard_port = ranks_per_node, dashboard_port
        self._directory = tempfile.mkdtemp(prefix="mm-ray-")  # short: paths of sockets below it may have 107 characters
        with self._environment():
            self._cluster = Cluster()
        self._nodes: list = []

    @property
    def address(self) -> str:
        return self._cluster.address

    def add_node(self) -> str:
        """Its name."""
        name = f"local-{len(self._nodes)}"
        of_head: dict = {"no_monitor": True, "include_dashboard": self._dashboard_port is not None}
        if self._dashboard_port:
            of_head |= {"dashboard_host": LOOPBACK, "dashboard_port": self._dashboard_port}
        with self._environment():
            node = self._cluster.add_node(
                num_cpus=1, num_gpus=self._ranks, node_name=name, node_ip_address=LOOPBACK,
                object_store_memory=STORE_BYTES, **({} if self._nodes else of_head),
            )  # fmt: skip
        self._nodes.append(node)
        return name

    def lose_node(self, name: str) -> None:
        """SIGKILL to all its processes. (A power cut would not even close connections.)"""
        self._cluster.remove_node(self._nodes[int(name.removeprefix("local-"))], allow_graceful=False)

    def close(self) -> None:
        """Drivers that are connected end with it."""
        self._cluster.shutdown()
        shutil.rmtree(self._directory, ignore_errors=True)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Of the daemons: RAY_TMPDIR too, or Ray would note this cluster where others look for theirs."""
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT | {"RAY_TMPDIR": self._directory})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def stay_on_loopback() -> None:
    """Import ray so that it does. Raises ConfigError when it was imported otherwise."""
    global _stays
    _stays = _stays or os.environ.get(SWITCH) == "0" or "ray" not in sys.modules
    if not _stays:
        raise ConfigError(
            "simulated nodes after `import ray`, with which Ray listens on every interface of this machine",
            f"a Ray cluster that runs already, or Ray imported with {SWITCH}=0",
            "set that variable before Python starts, or start a cluster (`ray start --head`) and pass --ray-address",
        )
    os.environ.setdefault(SWITCH, "0")
    import ray  # noqa: F401
