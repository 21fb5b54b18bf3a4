"""SGLang's RayEngine with ranks that are ours. Imports ray at its top, so only what runs on a cluster imports it."""

from collections.abc import Callable

from sglang.srt.ray.engine import RayEngine

from sglang_mm.cluster import end_actors
from sglang_mm.serving import supervisor, worker
from sglang_mm.serving.ray_ranks import Nodes, launch_actors, watch_actors


class NodesEngine(RayEngine):
    """Its actors lie where `on` says, and start with our plugin; when one ends, this process's supervisor hears of it.

    on: set before it starts, one in a process, as SGLang's own state is.
    """

    on: Nodes

    @classmethod
    def _launch_scheduler_processes(cls, server_args, port_args, run_scheduler_process_func, *, placement_group=None):
        launch = super()._launch_scheduler_processes
        guard = supervisor.current()
        result, none = launch_actors(launch, cls.on, guard.lost, server_args, port_args, run_scheduler_process_func)
        guard.ends_ranks_by(lambda: end(result.scheduler_actors, cls.on))
        watch_actors(result, cls.on, guard.lost)
        return result, none

    def shutdown(self) -> None:
        self.mm_watch.close()  # from now on they may end
        actors, self._scheduler_init_result.scheduler_actors = self._scheduler_init_result.scheduler_actors, []
        end(actors, self.on)
        super().shutdown()


def end(actors, on: Nodes) -> None:
    """Actors at once, wherever they are, then the connection to the cluster."""
    end_actors(actors)
    on.leave()


def launch_server(server_args, on: Nodes, *, launch_callback: Callable[[], None]) -> None:
    """SGLang's HTTP server in this process, its ranks on the nodes. Returns, or raises, when it ends."""
    from sglang.srt.entrypoints.http_server import _execute_server_warmup, _setup_and_run_http_server

    NodesEngine.on = on
    manager, templates, ports, ranks, watchdog, _ = NodesEngine._launch_subprocesses(
        server_args,
        init_tokenizer_manager_func=worker.init_tokenizer_manager,
        run_scheduler_process_func=worker.run_scheduler_process,
        run_detokenizer_process_func=worker.run_detokenizer_process,
    )
    try:
        _setup_and_run_http_server(
            server_args, manager, templates, ports, ranks.scheduler_infos, watchdog,
            execute_warmup_func=_execute_server_warmup, launch_callback=launch_callback,
        )  # fmt: skip
    finally:
        supervisor.current().close()  # from now on they may end
        end(ranks.scheduler_actors, on)
