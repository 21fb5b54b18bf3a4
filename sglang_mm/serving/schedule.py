"""Which schedule a prefill takes: the one that was asked for, or the one that the cost model finds faster; and how its
rows meet cached keys.
"""

import logging

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_mm.config import Config
from sglang_mm.parallel.calibration import calibrate
from sglang_mm.parallel.cost import ModelShape, choose, predict
from sglang_mm.parallel.holdings import Holdings
from sglang_mm.parallel.pass_q import travels
from sglang_mm.parallel.transport import Transport
from sglang_mm.types import BatchLayout, Residence

logger = logging.getLogger(__name__)


class ScheduleChoice:
    """Of one rank. All ranks of a ring agree: they know the same layout, and constants that were measured together.

    Each of the T rings measures for itself.
    """

    def __init__(self, config: Config, transport: Transport | None):
        self.asked, self.transport = config.schedule, transport
        self.constants = None

    def choose(
        self, layout: BatchLayout, model: torch.nn.Module, holdings: Holdings, done_before: bool
    ) -> tuple[str, dict[str, float]]:
        """(schedule, predicted seconds of attention and its transport by schedule, empty unless `auto`)

        holdings, done_before: as predict() takes them.
        """
        if self.asked != "auto" or layout.ranks == 1:
            return ("ring" if self.asked == "auto" else self.asked), {}
        self.prepare(model)
        nodes = self.transport.nodes
        predicted = predict(layout, shape_of(model), self.constants, holdings, done_before, nodes)
        return choose(predicted), predicted

    def way_to_cached(self, layout: BatchLayout, residence: Residence, model: torch.nn.Module) -> str:
        """`none`, `here`, `keys` or `queries`: see PrefillPlan. The fewer bytes travel."""
        cached = sum(own.start for own in layout.requests)
        if not cached:
            return "none"
        if residence.ranks == 1:
            return "here"
        shape, new = shape_of(model), layout.offsets[-1]
        query_bytes = shape.q_heads * shape.head_dim * shape.dtype.itemsize
        return (
            "keys"
            if travels(cached, new, shape.kv_bytes(shape.kv_heads), query_bytes, shape.state_bytes)
            else "queries"
        )

    def prepare(self, model: torch.nn.Module) -> None:
        """Measure what predictions need, once and below a second; collective. Done when the weights are loaded, or at
        the first prefill of a model that loads none.
        """
        is_open = self.asked == "auto" and self.transport is not None and self.transport.size > 1
        if is_open and self.constants is None:
            self.constants = calibrate(self.transport, shape_of(model))
            if self.transport.rank == 0:
                logger.info("schedule auto: %s", self.constants)


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Attention of one rank's share of a decoder whose layers are alike."""
    layers = [layer for layer in model.modules() if isinstance(layer, RadixAttention)]
    first, dtype = layers[0], next(model.parameters()).dtype
    return ModelShape(len(layers), first.tp_q_head_num, first.tp_k_head_num, first.qk_head_dim, dtype)
