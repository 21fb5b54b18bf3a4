"""The HTTP server: SGLang's own, started with our worker, routes and announcements."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack

from sglang_mm.config import Config
from sglang_mm.events import EventHub
from sglang_mm.pixels.wire import LOOPBACK
from sglang_mm.serving import media_access, port
from sglang_mm.serving.exposure import Exposure
from sglang_mm.serving.preflight import check_launch, environment
from sglang_mm.serving.ray_ranks import Nodes, nodes_for
from sglang_mm.serving.settings import refuse, set_by_user, to_argv
from sglang_mm.serving.sparse_method import with_known_plan

API_KEY = "SGLANG_MM_API_KEY"


def serve(
    config: Config,
    sglang_flags: list[str],
    *,
    on_start: Callable[[Config, str, str, Exposure], None],
    on_ready: Callable[[Config, dict, str], None],
    say: Callable[[str], None] = print,
) -> None:
    """Run until SIGINT or SIGTERM. Raises ConfigError or SelfCheckError before any process starts.

    on_start(config, model, device, exposure) is called before start-up, on_ready(config, rank 0's scheduler info, url)
    when requests are served; config with the plan that `auto` found. say(line): what happens in between.
    """
    with environment(config) as on_cpu, ExitStack() as until_the_end:
        from sglang.srt.entrypoints import http_server
        from sglang.srt.server_args import ServerArgs, prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from sglang_mm.serving import requests, sparse_request, storing, supervised

        sglang_flags = with_api_key(sglang_flags)
        asked = prepare_server_args(sglang_flags)
        config = with_known_plan(config, asked.model_path)
        config.to_env()
        refuse(config, asked)
        settled = set_by_user(asked, ServerArgs(model_path=asked.model_path))
        args = prepare_server_args(to_argv(config, sglang_flags, settled, on_cpu=on_cpu))
        check_launch(config, args, on_cpu=on_cpu)
        server_class = None if args.enable_http2 else http_server.uvicorn.Server
        until_the_end.enter_context(port.kept(args.host, args.port, server_class))
        exposure = Exposure.of(config, args)
        media_access.allow(exposure.directories)
        sparse_request.serve(config)
        on_start(config, args.model_path, "cpu (reference platform)" if on_cpu else "gpu", exposure)
        end_on_sigterm()  # until SGLang installs its own handler; Ray installs one when it is joined
        nodes = until_the_end.enter_context(nodes_for(config, args.model_path, on_cpu=on_cpu, say=say))
        host = nodes.cluster.host if nodes else LOOPBACK
        hub = until_the_end.enter_context(EventHub(host=host))
        store = until_the_end.enter_context(storing.open_store(config, host))
        watch = until_the_end.enter_context(supervised.served(config, hub, http_server, until_the_end))
        os.environ.update(hub.environment | store.environment)
        requests.show(hub)
        requests.add_routes(http_server.app)
        url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"

        def announce() -> None:
            on_ready(config, http_server.get_global_state().scheduler_info, url)

        end_on_sigterm()
        try:
            _launch(args, nodes, announce, say)
        finally:
            watch.close()
            kill_process_tree(os.getpid(), include_parent=False)


def end_on_sigterm() -> None:
    """By what runs in `finally` and ends the ranks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def with_api_key(sglang_flags: list[str]) -> list[str]:
    """The environment's, where the command line has none: a command line can be seen by all users of a machine."""
    key = os.environ.get(API_KEY)
    if not key or any(flag.partition("=")[0] == "--api-key" for flag in sglang_flags):
        return sglang_flags
    return [*sglang_flags, "--api-key", key]


def _launch(args, nodes: Nodes | None, announce: Callable[[], None], say: Callable[[str], None]) -> None:
    """SGLang's server, its ranks on this machine or on nodes. Returns, or raises, when it ends."""
    from sglang.srt.entrypoints import http_server

    from sglang_mm.serving import worker

    if nodes is None:
        http_server.launch_server(
            args,
            init_tokenizer_manager_func=worker.init_tokenizer_manager,
            run_scheduler_process_func=worker.run_scheduler_process,
            run_detokenizer_process_func=worker.run_detokenizer_process,
            launch_callback=announce,
        )
        return
    from sglang_mm.serving.ray_engine import launch_server

    say(f"  nodes      {nodes}")
    launch_server(args, nodes, launch_callback=announce)
