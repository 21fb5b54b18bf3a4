"""Whole prompts of a batch, as only SGLang's own batch knows them, and what each of their tokens is.

A prefill sees the new tokens alone. What a token is (a place of a frame, text between two frames) takes the prompt.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sglang_mm.errors import ConfigError
from sglang_mm.modality import Bundle, Medium, Wraps, family_of, map_from_offsets
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.serving.sparse_method import is_sparse
from sglang_mm.types import Modality, TokenMap

REMEMBERED = 64
_noted: dict[str, "Prompt"] = {}  # of the extend batch that was made last: SGLang may copy its ForwardBatch


@dataclass(frozen=True, eq=False)
class Prompt:
    """ids: the whole prompt, with SGLang's hashes over media. is_sparse: its K/V are kept under the plan's key."""

    rid: str
    ids: Sequence[int]
    is_sparse: bool


def note_prompts(forward_batch, batch) -> None:
    """Remember the prompts of an extend batch. batch: SGLang's own, which the ForwardBatch was made of."""
    if forward_batch.forward_mode.is_extend_without_speculative():
        _noted.clear()
        for req in batch.reqs:
            _noted[req.rid] = Prompt(req.rid, req.full_untruncated_fill_ids, is_sparse(req.extra_key))


def prompts_of(forward_batch) -> list[Prompt | None]:
    """Of each request of an extend batch; None for those that SGLang made for itself."""
    rids = forward_batch.rids or [None] * forward_batch.batch_size
    return [_noted.get(rid) for rid in rids]


@dataclass
class Known:
    """What is kept of a prompt between its chunks. masses: per layer, those of classes in its chunks up to `until`.

    kept: per chunk its packed layers, for --keep-selections.
    """

    rid: str
    tokens: TokenMap
    until: int = 0
    masses: dict[int, ClassMasses] = field(default_factory=dict)
    kept: list[tuple[range, list]] = field(default_factory=list)


class KnownPrompts:
    """Of the requests that were prefilled last. architecture: by which the family of models is known."""

    def __init__(self, model_config, device: torch.device | str):
        self.family = family_of(model_config.architectures[0])
        names = ("vision_start_token_id", "vision_end_token_id")
        self.wraps = Wraps(*(getattr(model_config, name, None) for name in names))
        self.device = device
        self._known: OrderedDict[tuple[str, int], Known] = OrderedDict()

    def of(self, prompt: Prompt, mm_inputs, start: int) -> Known:
        """mm_inputs: SGLang's, None for text. start: where the chunk that is computed now begins.

        Raises ConfigError for media whose frames cannot be told apart.
        """
        key = (prompt.rid, len(prompt.ids))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(prompt.rid, self._map(prompt.ids, mm_inputs).to(self.device))
        if known.until != start:  # it was retracted, or found in the prefix cache
            known.masses.clear()
            known.kept.clear()
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _map(self, ids: Sequence[int], mm_inputs) -> TokenMap:
        bundles = [_bundle(item) for item in (mm_inputs.mm_items if mm_inputs is not None else ())]
        numbers = torch.frombuffer(ids, dtype=torch.int64) if isinstance(ids, array) else torch.tensor(list(ids))
        return map_from_offsets(self.family, numbers, bundles, self.wraps)


def _bundle(item) -> Bundle:
    """item: SGLang's, of one or more images, or videos."""
    modality = Modality.VIDEO if item.is_video() else Modality.IMAGE
    grid = item.model_specific_data.get(f"{modality.name.lower()}_grid_thw")
    if grid is None or item.offsets is None:
        raise ConfigError(f"a {modality.name.lower()} without a grid or a marker", "both", "send it as pixels")
    return Bundle(
        item.offsets, [Medium(modality, tuple(each)) for each in torch.as_tensor(grid).reshape(-1, 3).tolist()]
    )
