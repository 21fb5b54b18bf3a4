"""`sglang_mm.Engine`: SGLang's Engine with our arguments beside its own."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from types import new_class

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.events import EventHub
from sglang_mm.pixels.wire import LOOPBACK
from sglang_mm.serving import media_access, worker
from sglang_mm.serving.preflight import check_launch, environment
from sglang_mm.serving.ray_ranks import nodes_for
from sglang_mm.serving.settings import refuse, server_settings
from sglang_mm.serving.sparse_method import with_known_plan
from sglang_mm.serving.supervisor import Supervisor

with environment(Config()):  # SGLang decides at import which platform it is on
    from sglang.srt.entrypoints import engine as stock
    from sglang.srt.server_args import ServerArgs

    from sglang_mm.serving import requests, sparse_request, storing, supervised

logger = logging.getLogger(__name__)


class Engine(stock.Engine):
    """Offline engine. `Engine(model_path=M, tp=1, cp=2, ...)`: cp and the flags of sglang_mm.launch are ours, every
    other keyword is SGLang's ServerArgs (tp_size is accepted for tp). Its requests may name any file, unless
    allow_local_media says otherwise. Raises ConfigError or SelfCheckError before any process starts.
    """

    init_tokenizer_manager_func = staticmethod(worker.init_tokenizer_manager)
    run_detokenizer_process_func = staticmethod(worker.run_detokenizer_process)
    run_scheduler_process_func = staticmethod(worker.run_scheduler_process)

    def __init__(
        self,
        *,
        tp: int | None = None,
        cp: int = 1,
        schedule: str = "auto",
        kv: str = "sharded",
        cp_min_tokens: int = 512,
        vision: str = "frames",
        deadline_s: float = 600.0,
        allow_local_media: Sequence[str] = (),
        media_dir: str = "",
        sparse: str = "off",
        kernel_backend: str = "auto",
        sparse_min_tokens: int = 4096,
        keep_selections: str = "",
        nodes: int = 1,
        ray_address: str = "",
        nodes_deadline_s: float = 600.0,
        **sglang_args,
    ):
        tp = sglang_args.pop("tp_size", 1) if tp is None else tp
        chosen = (schedule, kv, cp_min_tokens, vision, deadline_s, allow_local_media, media_dir)
        chosen += (sparse, kernel_backend, sparse_min_tokens, keep_selections, nodes, ray_address, nodes_deadline_s)
        config = Config(tp, cp, *chosen)
        self.mm_config = with_known_plan(config, str(sglang_args.get("model_path", "")))
        if "server_args" in sglang_args:
            raise ConfigError("server_args=...", "ServerArgs' fields as keywords", "pass Engine(**fields)")
        with environment(self.mm_config) as on_cpu:
            asked = ServerArgs(**sglang_args)
            refuse(self.mm_config, asked)
            check_launch(self.mm_config, asked, on_cpu=on_cpu)
            sparse_request.serve(self.mm_config)
            media_access.allow(self.mm_config.allow_local_media or (media_access.ANYWHERE,))
            must, may = server_settings(self.mm_config, on_cpu=on_cpu)
            self.mm_until_shutdown = ExitStack()
            try:
                self._open(asked, on_cpu)
                if self.mm_nodes:
                    self._become_ray_engine()
                with supervised.explained(self.mm_watch):
                    super().__init__(**(may | sglang_args | must))
                supervised.guard(self, self.mm_watch)
            except BaseException:
                self.mm_until_shutdown.close()
                raise

    def _open(self, asked, on_cpu: bool) -> None:
        """What this process holds beside SGLang's engine, until the shutdown. asked: SGLang's ServerArgs."""
        until_shutdown, config = self.mm_until_shutdown.enter_context, self.mm_config
        self.mm_nodes = until_shutdown(nodes_for(config, asked.model_path, on_cpu=on_cpu, say=logger.warning))
        host = self.mm_nodes.cluster.host if self.mm_nodes else LOOPBACK
        self.mm_hub = until_shutdown(EventHub(host=host))
        self.mm_pixels = until_shutdown(storing.open_store(config, host))
        self.mm_watch = until_shutdown(Supervisor(self.mm_hub, config.deadline_s, config.world_size))
        os.environ.update(self.mm_hub.environment | self.mm_pixels.environment)
        requests.show(self.mm_hub)

    def _become_ray_engine(self) -> None:
        """SGLang's RayEngine too. Not earlier: what imports ray settles on which interfaces it listens."""
        from sglang_mm.serving.ray_engine import NodesEngine

        self.__class__ = new_class(type(self).__name__, (type(self), NodesEngine))
        NodesEngine.on = self.mm_nodes

    @property
    def events(self) -> str:
        """Where `python -m sglang_mm.launch.monitor --events` can listen."""
        return self.mm_hub.address

    def shutdown(self):
        try:
            super().shutdown()
        finally:
            requests.hide(self.mm_hub)
            self.mm_until_shutdown.close()
