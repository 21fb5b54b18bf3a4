"""Ranks of a real server or engine in which a fault can be armed: a file says which rank, layer and fault.

The product knows nothing of it: what is wrapped here is wrapped in the ranks' own processes.
"""

import json
import os
import time
from pathlib import Path

from sglang_mm.serving import worker
from tests.faults.ranks import STRIKES
from tests.serving.observed import _telling as telling

ENV = "SGLANG_MM_TEST_FAULT"  # the file's path
PACE_S = 0.1
LOADING = "exception while loading"
KILLED_LOADING = "SIGKILL while loading"
_own: dict[str, int] = {}


def arm(path: Path, fault: str, rank: int, layer: int = 0) -> None:
    """From now on. layer: where attention starts with it."""
    half = path.with_suffix(".half")
    half.write_text(json.dumps({"fault": fault, "rank": rank, "layer": layer}))
    half.rename(path)


def struck_at(path: Path) -> float:
    """time.time() at which the fault came true."""
    return float(path.with_suffix(".struck").read_text())


def run_faulty_scheduler(*args, **kwargs) -> None:
    """In the place of worker.run_scheduler_process."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_mm.parallel.distributed import DistributedTransport
    from sglang_mm.serving.backend import RingAttentionBackend
    from sglang_mm.serving.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

    RingAttentionBackend.forward_extend = _striking(RingAttentionBackend.forward_extend)
    DistributedTransport.check_equal = _differing(DistributedTransport.check_equal)
    Model.load_weights = _unloadable(Model.load_weights)
    Scheduler.get_internal_state = telling(Scheduler.get_internal_state)
    _own["rank"] = args[3]  # SGLang's order: server_args, port_args, gpu_id, tp_rank
    worker.run_scheduler_process(*args, **kwargs)


def _armed() -> dict | None:
    """The fault of this rank, if it has one."""
    path = Path(os.environ[ENV])
    if not path.exists():
        return None
    armed = json.loads(path.read_text())
    return armed if armed["rank"] == _own["rank"] else None


def _note_strike() -> None:
    path = Path(os.environ[ENV]).with_suffix(".struck")
    if not path.exists():
        path.write_text(str(time.time()))


def _striking(original):
    def forward_extend(self, q, k, v, layer, forward_batch, *args, **kwargs):
        armed = _armed()
        if armed and armed["fault"] == "3x slow":
            _note_strike()
            time.sleep(3 * PACE_S)
        elif armed and armed["fault"] in STRIKES and armed["layer"] == layer.layer_id:
            _note_strike()
            STRIKES[armed["fault"]]()
        return original(self, q, k, v, layer, forward_batch, *args, **kwargs)

    return forward_extend


def _differing(original):
    def check_equal(self, number, what):
        armed = _armed()
        if armed and armed["fault"] == "wrong digest":
            _note_strike()
            number ^= 1
        return original(self, number, what)

    return check_equal


def _unloadable(original):
    def load_weights(self, weights):
        armed = _armed()
        if armed and armed["fault"] == LOADING:
            raise ValueError("a shard of the weights is cut off")
        if armed and armed["fault"] == KILLED_LOADING:
            STRIKES["SIGKILL"]()
        return original(self, weights)

    return load_weights
