"""From token ids and grids to what each token is. Pure integers; knows no ranks, kernels or sglang."""

from sglang_mm.modality.doors import Bundle, map_from_ids, map_from_offsets
from sglang_mm.modality.families import FAMILIES, family_of
from sglang_mm.modality.family import Family, Medium, Part
from sglang_mm.modality.media import MediaSpan, frames_of, runs_of
from sglang_mm.modality.token_map import JOIN_BELOW, Item, Wraps, build_token_map, frame_places

__all__ = [
    "FAMILIES",
    "JOIN_BELOW",
    "Bundle",
    "Family",
    "Item",
    "MediaSpan",
    "Medium",
    "Part",
    "Wraps",
    "build_token_map",
    "family_of",
    "frame_places",
    "frames_of",
    "map_from_ids",
    "map_from_offsets",
    "runs_of",
]
