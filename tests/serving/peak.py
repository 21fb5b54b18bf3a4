"""An engine whose ranks tell what tensor memory each forward of a prefill took at its peak, and who held it."""

import json
import os
import tempfile
from pathlib import Path

import sglang_mm
from sglang_mm.serving import worker
from tests.memory import PeakMeter

PEAKS = "SGLANG_MM_TEST_PEAKS"  # a directory with one file per rank, a line per prefill


def run_metered_scheduler(*args, **kwargs) -> None:
    from sglang_mm.serving.context_parallel import ContextParallelMixin

    ContextParallelMixin.forward = _metered(ContextParallelMixin.forward)
    ContextParallelMixin._run_decoder = _in_phase(ContextParallelMixin._run_decoder, "decoder")
    worker.run_scheduler_process(*args, **kwargs)


class MeteredEngine(sglang_mm.Engine):
    run_scheduler_process_func = staticmethod(run_metered_scheduler)

    def __init__(self, **arguments):
        self.folder = Path(tempfile.mkdtemp(prefix="peaks-"))
        os.environ[PEAKS] = str(self.folder)
        super().__init__(**arguments)

    def peaks(self) -> list[list[dict]]:
        """Per rank its prefills in order; of each, of `all` and of `decoder`: bytes, the top call sites, and big:
        (shape, call site) of the float tensors of at least new tokens x hidden elements.
        """
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(self.folder.iterdir())]


def _metered(forward):
    from sglang.srt.runtime_context import get_parallel

    def metered(self, input_ids, positions, forward_batch, *args, **kwargs):
        if not forward_batch.forward_mode.is_extend():
            return forward(self, input_ids, positions, forward_batch, *args, **kwargs)
        with PeakMeter(big=len(input_ids) * self.config.hidden_size) as meter:
            self.mm_meter = meter
            output = forward(self, input_ids, positions, forward_batch, *args, **kwargs)
        phases = {"all": meter.peak} | meter.phases
        told = {
            name: {"bytes": peak.bytes, "top": peak.top(), "big": sorted(peak.big)} for name, peak in phases.items()
        }
        with Path(os.environ[PEAKS], f"rank {get_parallel().tp_rank}").open("a") as file:
            file.write(json.dumps(told) + "\n")
        return output

    return metered


def _in_phase(run, name: str):
    def running(self, *args, **kwargs):
        with self.mm_meter.phase(name):
            return run(self, *args, **kwargs)

    return running
