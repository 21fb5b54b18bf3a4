"""The families by name, and by the names that Hugging Face configurations give their models."""

from sglang_mm.errors import ConfigError
from sglang_mm.modality.families.internvl import InternVL
from sglang_mm.modality.families.llava_onevision import LlavaOneVision
from sglang_mm.modality.families.llava_video import LlavaVideo
from sglang_mm.modality.families.longvila import LongVila
from sglang_mm.modality.families.nvila import NVila, NVilaLite
from sglang_mm.modality.families.plain import Plain
from sglang_mm.modality.families.qwen2_5_vl import Qwen25VL
from sglang_mm.modality.families.qwen3_vl import Qwen3VL
from sglang_mm.modality.families.videochat_flash import VideoChatFlash
from sglang_mm.modality.family import Family

_FAMILIES: tuple[Family, ...] = (
    Qwen25VL(),
    Qwen3VL(),
    LlavaOneVision(),
    LlavaVideo(),
    LongVila(),
    NVila(),
    NVilaLite(),
    InternVL(),
    VideoChatFlash(),
    Plain(),
)
FAMILIES = {family.name: family for family in _FAMILIES}
_BY_MODEL = {model: family for family in _FAMILIES for model in family.models}


def family_of(name: str) -> Family:
    """The family of a model, by our name, an architecture or a model type, with the sizes of the released models.

    Other sizes are fields: `dataclasses.replace(family_of("qwen2_5_vl"), merge=4)`. Raises ConfigError if unknown.
    """
    family = FAMILIES.get(name) or _BY_MODEL.get(name)
    if family is None:
        known = ", ".join([*FAMILIES, *_BY_MODEL])
        raise ConfigError(f"model {name!r}", known, 'use family "plain", whose frames are what the grid says')
    return family


__all__ = [
    "FAMILIES",
    "InternVL",
    "LlavaOneVision",
    "LlavaVideo",
    "LongVila",
    "NVila",
    "NVilaLite",
    "Plain",
    "Qwen3VL",
    "Qwen25VL",
    "VideoChatFlash",
    "family_of",
]
