"""Nouns every room shares, so that rooms that do not know of each other can meet. They import torch alone."""

from sglang_mm.types.layout import BatchLayout, Frame, FrameKey, Layout, Run, digest64
from sglang_mm.types.program import INF, TileProgram
from sglang_mm.types.residence import Residence, page_for
from sglang_mm.types.tokens import Axis, Classes, Modality, Place, TokenMap

__all__ = [
    "INF",
    "Axis",
    "BatchLayout",
    "Classes",
    "Frame",
    "FrameKey",
    "Layout",
    "Modality",
    "Place",
    "Residence",
    "Run",
    "TileProgram",
    "TokenMap",
    "digest64",
    "page_for",
]
