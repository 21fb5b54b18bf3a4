"""To a Ray cluster: the one that was named, the one that runs here, or one that is started for this run."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sglang_mm.cluster.local import simulated
from sglang_mm.errors import ConfigError

HOOK = "sglang_mm.serving.ray_worker.set_up"  # what Ray calls in every new worker process
REACH_DEADLINE_S = 5.0
ALLOWED = "auto, local, or HOST:PORT of a Ray head, as `ray start --head` prints it"


@dataclass(frozen=True)
class Cluster:
    """address: of the Ray head; empty for a Ray that the program had started itself. is_simulated: its nodes are
    processes of this machine. host: how nodes find this one. node_id: Ray's id of this node."""

    address: str
    is_simulated: bool
    host: str
    node_id: str

    def __str__(self) -> str:
        if self.is_simulated:
            return "simulated on this machine, for trying out"
        return f"Ray at {self.address}" if self.address else "the Ray of this program"


@contextmanager
def connected(address: str, nodes: int, ranks_per_node: int, *, may_simulate: bool) -> Iterator[Cluster]:
    """Connect, and let go on leaving. address: HOST:PORT; `auto`: the cluster that RAY_ADDRESS names or that runs on
    this machine; `local`: a new one of `nodes` simulated nodes; empty: `auto` where there is one, else `local`.

    A program that has called ray.init keeps its connection, of whatever address. may_simulate: False where ranks need
    GPUs. Raises ConfigError for an address where no Ray answers, or a cluster that cannot be simulated.
    """
    if find_spec("ray") is None:
        given = f"--nodes {nodes}{f' --ray-address {address}' if address else ''} without Ray"
        raise ConfigError(given, "Ray installed", "pip install 'sglang_mm[serve,ray]'")
    with ExitStack() as until_the_end:
        found = _resolve(address)
        if found is None:
            if not may_simulate:
                raise ConfigError(
                    f"--nodes {nodes}{f' --ray-address {address}' if address else ''}, and no Ray cluster is running",
                    "nodes are simulated only where ranks run on CPU",
                    "run `ray start --head` here and `ray start --address HEAD:PORT` on the other nodes, then again",
                )
            found = until_the_end.enter_context(simulated(nodes, ranks_per_node)).address
            yield _join(found, True, until_the_end)
        else:
            yield _join(found, False, until_the_end)


def _resolve(address: str) -> str | None:
    """HOST:PORT that answers; empty for the program's own connection; None to start a cluster."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {address}", ALLOWED, "start this on a node of the cluster: rank 0 runs beside it"
        )
    if address == "local" and _has_started_ray():
        given = "--ray-address local in a program that is connected to a Ray cluster"
        raise ConfigError(given, ALLOWED, "leave it out to use that cluster, or call ray.shutdown() first")
    if address == "local":
        return None
    if _has_started_ray():
        return ""
    named = os.environ.get("RAY_ADDRESS", "") if address in ("", "auto") else address
    if named and named not in ("auto", "local"):
        return _answering(named, f"--ray-address {address}" if address not in ("", "auto") else f"RAY_ADDRESS={named}")
    running = _running_here()
    if running is None and address == "auto":
        raise ConfigError("--ray-address auto, and no Ray runs on this machine", ALLOWED, "run `ray start` here first")
    return running


def _has_started_ray() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _running_here() -> str | None:
    """Where the newest cluster of this machine answers; what is left of one that ended counts as none."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    noted = Path(temporary, "ray", "ray_current_cluster")  # by `ray start`, and read by it
    try:
        return _answering(noted.read_text().strip(), "auto")
    except (OSError, ConfigError):
        return None


def _answering(address: str, given: str) -> str:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(given, ALLOWED, "pass the address of the head")
    if not _speaks_grpc(host.strip("[]"), int(port)):
        raise ConfigError(f"{given}, where no Ray answers", ALLOWED, "check that the head runs")
    return address


def _speaks_grpc(host: str, port: int) -> bool:
    """Within a deadline: ray.init would try for minutes."""
    import grpc

    try:
        socket.create_connection((host, port), REACH_DEADLINE_S).close()
    except OSError:
        return False
    channel = grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        grpc.channel_ready_future(channel).result(REACH_DEADLINE_S)
        return True
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()


def _join(address: str, is_simulated: bool, until_the_end: ExitStack) -> Cluster:
    import ray

    if ray.is_initialized():
        _check_hook(ray)
    else:
        hook = {"worker_process_setup_hook": HOOK}
        # what ranks print comes here as it does on one machine
        try:
            ray.init(address=address, runtime_env=hook, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:  # also a hook that a job brings along
            given = f"{address}, which Ray cannot join ({' '.join(str(error).split())})"
            remedy = "leave worker_process_setup_hook out of the job's runtime_env, and see Ray's logs"
            raise ConfigError(given, ALLOWED, remedy) from None
        until_the_end.callback(ray.shutdown)
    return Cluster(address, is_simulated, ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())


def _check_hook(ray) -> None:
    """Without it SGLang's actors load no plugins."""
    there = ray.get_runtime_context().runtime_env.get("worker_process_setup_hook")
    if there != HOOK:
        raise ConfigError(
            f"ray.init was called with worker_process_setup_hook {there!r}", repr(HOOK),
            f'call ray.init(runtime_env={{"worker_process_setup_hook": "{HOOK}"}}), or leave it to sglang_mm',
        )  # fmt: skip
