"""NVILA: like LongVILA, but the end of a frame is text that the processor writes behind the frame's placeholders.

    P P P P E P P P P E P P P P E          a video of 3 frames of 2 x 2: the offsets are those of P alone

So the offsets are one stretch a frame, and the end is counted with the frame, not with the text between two frames.
An image in blocks is merged to one grid of all its blocks (NVILA), or a frame a tile (NVILA-Lite). Sources: SGLang,
models/nvila.py and nvila_lite.py, whose embeddings have no ends; the model's own processor, which puts the id of "\\n"
in the place of the last placeholder of every frame.
"""

from dataclasses import dataclass

from sglang_mm.modality.families.longvila import LongVila


@dataclass(frozen=True)
class NVila(LongVila):
    beside: int = 1

    name = "nvila"
    models = ("NVILAForConditionalGeneration",)


@dataclass(frozen=True)
class NVilaLite(NVila):
    """32 x 32 patches, padded to 33 x 33, in blocks of 3 x 3."""

    side: int = 11

    name = "nvila_lite"
    models = ("NVILALiteForConditionalGeneration", "nvila_lite")
