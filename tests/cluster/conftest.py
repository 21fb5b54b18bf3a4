"""One cluster of two nodes for the session, with Ray's job server; nothing else in this process uses Ray."""

import os
from dataclasses import dataclass

import pytest

from sglang_mm.cluster.local import ENVIRONMENT, LocalCluster, simulated
from sglang_mm.demo.server import free_port
from sglang_mm.tiny import write_checkpoint

RANKS_PER_NODE = 1


@dataclass(frozen=True)
class Local:
    """nodes: to add and lose. jobs: where Ray's job server listens. environment: for processes that connect."""

    nodes: LocalCluster
    jobs: str
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return self.nodes.address


@pytest.fixture(scope="session")
def cluster():
    port = free_port()
    with simulated(2, RANKS_PER_NODE, dashboard_port=port) as nodes:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | ENVIRONMENT
        yield Local(nodes, f"http://127.0.0.1:{port}", environment)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))
