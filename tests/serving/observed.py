"""An engine whose ranks tell what they hold: free and cached K/V slots, request slots, resident memory."""

import json
import os
import tempfile
import time
from pathlib import Path

import psutil

import sglang_mm
from sglang_mm.serving import worker

DEADLINE_S = 60
_decoded = {"rows": 0}  # of this rank: the largest batch it has decoded
STATES = "SGLANG_MM_TEST_STATES"  # a directory with one file per rank


def run_observed_scheduler(*args, **kwargs) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_mm.serving.paged_backend import PagedAttentionBackend

    PagedAttentionBackend.forward_decode = _counting(PagedAttentionBackend.forward_decode)
    Scheduler.get_internal_state = _telling(Scheduler.get_internal_state)
    worker.run_scheduler_process(*args, **kwargs)


class ObservedEngine(sglang_mm.Engine):
    run_scheduler_process_func = staticmethod(run_observed_scheduler)

    def __init__(self, **arguments):
        self.states = Path(tempfile.mkdtemp(prefix="states-"))
        os.environ[STATES] = str(self.states)
        super().__init__(**arguments)

    def generate(self, *args, **request):
        return super().generate(*args, **_densely(request))

    async def async_generate(self, *args, **request):
        return await super().async_generate(*args, **_densely(request))

    def rank_states(self) -> list[dict]:
        """Of every rank. SGLang waits for rank 0's answer alone; the others' files come when they come."""
        for old in self.states.iterdir():
            old.unlink()
        self.get_server_info()
        expected, until = self.mm_config.world_size, time.monotonic() + DEADLINE_S
        while len(told := sorted(self.states.glob("rank *"))) < expected:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(told)} of {expected} ranks told what they hold within {DEADLINE_S} s")
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in told]


def _densely(request: dict) -> dict:
    """What does not say otherwise is dense: one engine serves the tests of dense and of sparse prefill."""
    asked = request.get("sampling_params") or {}
    each = asked if isinstance(asked, list) else [asked]
    dense = [{"custom_params": {"sparse": "off"}, **params} for params in each]
    return {**request, "sampling_params": dense if isinstance(asked, list) else dense[0]}


def _counting(original):
    def forward_decode(self, q, *args, **kwargs):
        _decoded["rows"] = max(_decoded["rows"], len(q))
        return original(self, q, *args, **kwargs)

    return forward_decode


def _telling(original):
    from sglang.srt.runtime_context import get_parallel

    def get_internal_state(self, request):
        allocator, cache = self.token_to_kv_pool_allocator, self.tree_cache
        state = {
            "slots": self.max_total_num_tokens,
            "free": allocator.available_size(),
            "cached": cache.evictable_size(),
            "locked": cache.protected_size(),
            "free_requests": self.req_to_token_pool.available_size(),
            "requests": self.req_to_token_pool.size,
            "most_decoded": _decoded["rows"],
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        path = Path(os.environ[STATES], f"rank {get_parallel().tp_rank}")
        half = path.with_name(f"half of {path.name}")
        half.write_text(json.dumps(state))
        half.rename(path)
        return original(self, request)

    return get_internal_state
