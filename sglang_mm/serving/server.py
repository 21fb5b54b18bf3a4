"""The HTTP server: SGLang's own, started with our worker, routes and announcements."""

import os
import signal
import sys
from collections.abc import Callable

from sglang_mm.config import Config
from sglang_mm.serving.preflight import check_launch, check_port, environment
from sglang_mm.serving.settings import refuse, set_by_user, to_argv


def serve(
    config: Config,
    sglang_flags: list[str],
    *,
    on_start: Callable[[str, str], None],
    on_ready: Callable[[dict, str], None],
) -> None:
    """Run until SIGINT or SIGTERM. Raises ConfigError or SelfCheckError before any process starts.

    on_start(model, device) is called before start-up, on_ready(rank 0's scheduler info, url) when requests are served.
    """
    with environment(config) as on_cpu:
        from sglang.srt.entrypoints import http_server
        from sglang.srt.server_args import ServerArgs, prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from sglang_mm.serving import requests, worker

        asked = prepare_server_args(sglang_flags)
        refuse(config, asked)
        settled = set_by_user(asked, ServerArgs(model_path=asked.model_path))
        args = prepare_server_args(to_argv(config, sglang_flags, settled, on_cpu=on_cpu))
        check_port(args.host, args.port)
        check_launch(config, args.model_path, trust_remote_code=args.trust_remote_code, revision=args.revision)
        on_start(args.model_path, "cpu (reference platform)" if on_cpu else "gpu")
        requests.add_routes(http_server.app)
        url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"

        def announce() -> None:
            on_ready(http_server.get_global_state().scheduler_info, url)

        # until SGLang installs its own handler, SIGTERM must reach the `finally` that ends the ranks
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            http_server.launch_server(
                args,
                init_tokenizer_manager_func=worker.init_tokenizer_manager,
                run_scheduler_process_func=worker.run_scheduler_process,
                launch_callback=announce,
            )
        finally:
            kill_process_tree(os.getpid(), include_parent=False)
