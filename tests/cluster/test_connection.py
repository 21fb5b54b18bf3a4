"""Addresses that cannot work are refused before anything starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_mm.cluster.connection import _running_here, _speaks_grpc, connected
from sglang_mm.cluster.placement import _sortable
from sglang_mm.config import Config
from sglang_mm.demo.server import free_port
from sglang_mm.errors import ConfigError


def in_a_process(code: str, **environment: str) -> str:
    """Its last line: this process may be connected to a cluster already, and Ray knows one at a time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=kept | environment
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


CONNECT = "from sglang_mm.cluster import connected\nwith connected({!r}, 2, 1, may_simulate=False): pass"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://10.0.0.1:10001", "start this on a node of the cluster"),
        ("somewhere", "HOST:PORT of a Ray head"),
        ("local", "nodes are simulated only where ranks run on CPU"),
    ],
)
def test_addresses_that_cannot_work(address, told):
    with pytest.raises(ConfigError) as caught, connected(address, 2, 1, may_simulate=False):
        pass
    assert told in str(caught.value) and address in str(caught.value)


def test_where_nothing_answers(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    told = in_a_process(CONNECT.format(address))
    assert f"--ray-address {address}, where no Ray answers" in told
    told = in_a_process(CONNECT.format("auto"), RAY_ADDRESS=address)
    assert f"RAY_ADDRESS={address}, where no Ray answers" in told
    told = in_a_process(CONNECT.format("auto"), RAY_TMPDIR=str(tmp_path))
    assert "--ray-address auto, and no Ray runs on this machine" in told
    told = in_a_process(CONNECT.format(""), RAY_TMPDIR=str(tmp_path))
    assert "--nodes 2, and no Ray cluster is running" in told and "ray start --head" in told


def test_what_answers_is_not_ray():
    with socket.create_server(("127.0.0.1", 0)) as other:
        host, port = other.getsockname()
        assert not _speaks_grpc(host, port)


def test_a_cluster_that_ended_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert _running_here() is None
    (tmp_path / "ray").mkdir()
    noted = Path(tmp_path, "ray", "ray_current_cluster")
    noted.write_text(f"127.0.0.1:{free_port()}")
    assert _running_here() is None


def test_ray_imported_too_early_would_listen_to_the_world():
    code = "import ray\nfrom sglang_mm.cluster.local import simulated\nwith simulated(1, 1): pass"
    assert "simulated nodes after `import ray`" in in_a_process(code)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"cp": 4, "nodes": 3}, "--nodes 3 with --cp 4. Allowed: --nodes 1, 2, 4"),
        ({"cp": 4, "nodes": 0}, "--nodes 0"),
        ({"cp": 2, "nodes": 2, "nodes_deadline_s": 0}, "--nodes-deadline 0"),
    ],
)
def test_numbers_of_nodes(arguments, told):
    with pytest.raises(ConfigError) as caught:
        Config(**arguments)
    assert told in str(caught.value)


def test_hosts_are_ordered_as_numbers():
    hosts = ["10.0.0.10", "b.example", "10.0.0.9", "fe80::1"]
    assert sorted(hosts, key=_sortable) == ["10.0.0.9", "10.0.0.10", "fe80::1", "b.example"]
