"""Which schedule a prefill takes: the one that was asked for, or the one that the cost model finds faster."""

import logging

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_mm.config import Config
from sglang_mm.parallel.calibration import calibrate
from sglang_mm.parallel.cost import ModelShape, choose, predict
from sglang_mm.parallel.transport import Transport
from sglang_mm.types import BatchLayout

logger = logging.getLogger(__name__)


class ScheduleChoice:
    """Of one rank. All ranks agree: they know the same layout, and constants that were measured together."""

    def __init__(self, config: Config, transport: Transport):
        self.asked, self.transport = config.schedule, transport
        self.constants = None

    def choose(self, layout: BatchLayout, model: torch.nn.Module) -> tuple[str, dict[str, float]]:
        """(schedule, predicted seconds of attention and its transport by schedule, empty unless `auto`).

        Collective when `auto` is asked for the first time: it measures what the prediction needs, below a second.
        """
        if self.asked != "auto":
            return self.asked, {}
        shape = shape_of(model)
        if self.constants is None:
            self.constants = calibrate(self.transport, shape)
            if self.transport.rank == 0:
                logger.info("schedule auto: %s", self.constants)
        predicted = predict(layout, shape, self.constants)
        return choose(predicted), predicted


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Attention of one rank's share of a decoder whose layers are alike."""
    layers = [layer for layer in model.modules() if isinstance(layer, RadixAttention)]
    first, dtype = layers[0], next(model.parameters()).dtype
    return ModelShape(len(layers), first.tp_q_head_num, first.tp_k_head_num, first.qk_head_dim, dtype)
