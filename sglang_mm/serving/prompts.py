"""Whole prompts of a batch, as only SGLang's own batch knows them, and what each of their tokens is.

A prefill sees the new tokens alone. What a token is (a place of a frame, text between two frames) takes the prompt.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from sglang_mm.config import Config
from sglang_mm.errors import ConfigError
from sglang_mm.modality import Bundle, Medium, Wraps, family_of, map_from_offsets
from sglang_mm.patterns.select.choose import ClassMasses
from sglang_mm.serving.sparse_method import cache_key, is_sparse
from sglang_mm.types import Modality, TokenMap, digest64

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
        own = _own_key()
        for req in batch.reqs:
            _noted[req.rid] = Prompt(req.rid, req.full_untruncated_fill_ids, is_sparse(req.extra_key, own))


@cache
def _own_key() -> str | None:
    """Of the server that this process belongs to."""
    config = Config.from_env()
    return cache_key(config) if config is not None else None


def prompts_of(forward_batch) -> list[Prompt | None]:
    """Of each request of an extend batch; None for those that SGLang made for itself."""
    rids = forward_batch.rids or [None] * forward_batch.batch_size
    return [_noted.get(rid) for rid in rids]


@dataclass
class Known:
    """What is kept of a prompt between its chunks. masses: per layer, those of classes in its chunks up to `until`.

    digest: of the map, alike on all ranks. kept: per chunk its packed layers, for --keep-selections.
    """

    prompt: Prompt
    tokens: TokenMap
    digest: int
    until: int = 0
    masses: dict[int, ClassMasses] = field(default_factory=dict)
    kept: list[tuple[range, list]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.until == len(self.tokens)


class KnownPrompts:
    """Prompts that go on after the chunk that was computed last. fewest: new tokens from which a request is sparse."""

    def __init__(self, model_config, device: torch.device | str, fewest: int):
        self.family = family_of(model_config.architectures[0])
        names = ("vision_start_token_id", "vision_end_token_id")
        self.wraps = Wraps(*(getattr(model_config, name, None) for name in names))
        self.device, self.fewest = device, fewest
        self._known: OrderedDict[str, Known] = OrderedDict()

    def is_long(self, prompt: Prompt, start: int) -> bool:
        """Whether the rest of the prompt, from `start` on, is long enough to be sparse, or goes on being it."""
        known = self._known.get(prompt.rid)
        return len(prompt.ids) - start >= self.fewest or (known is not None and 0 < known.until == start)

    def of(self, prompt: Prompt, mm_inputs, start: int) -> Known:
        """mm_inputs: SGLang's, None for text. start: where the chunk that is computed now begins.

        Raises ConfigError for media whose frames cannot be told apart.
        """
        known = self._known.get(prompt.rid)
        if known is None or known.until != start or known.prompt.ids != prompt.ids:  # new, retracted, or another one
            tokens = self._map(prompt.ids, mm_inputs)
            digest = digest64([len(tokens)], tokens.span, tokens.place)
            known = self._known[prompt.rid] = Known(prompt, tokens.to(self.device), digest)
        self._known.move_to_end(prompt.rid)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    def forget(self, known: Known) -> None:
        """Of a prompt that is done: what its classes weighed takes up to a gigabyte."""
        if self._known.get(known.prompt.rid) is known:
            del self._known[known.prompt.rid]

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
