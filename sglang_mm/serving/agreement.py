"""Replicas sample from the same logits; should two of them draw different tokens, they settle on one and it is counted.

A replica that went on with another token would compute other keys, and the ring would mix them.
"""

import logging

import torch

from sglang_mm.parallel.transport import Transport

logger = logging.getLogger(__name__)
_ring: Transport | None = None
_differing: torch.Tensor | None = None  # on the device, so that a decode step does not wait for it
_told = 0


def join(ring: Transport | None) -> None:
    """The ring of this process, whose ranks have to agree; None: there is nobody to agree with."""
    global _ring, _differing
    _ring = ring
    _differing = None if ring is None else torch.zeros((), dtype=torch.int64, device=ring.device)


def settle(original, sampler, token_ids: torch.Tensor, sampling_info) -> None:
    """Around-hook on Sampler._sync_token_ids_across_tp. token_ids [B] of this rank, replaced by those of rank 0."""
    if _ring is not None and _ring.size > 1:
        drawn = torch.stack(_drawn_by_all(token_ids, _ring))
        _differing.add_((drawn != drawn[0]).any(0).sum())
        token_ids.copy_(drawn[0])
    original(sampler, token_ids, sampling_info)


def _drawn_by_all(token_ids: torch.Tensor, ring: Transport) -> list[torch.Tensor]:
    return ring.all_to_all([token_ids] * ring.size, [len(token_ids)] * ring.size, "sampled tokens", kind="checks")


def differing_tokens() -> int:
    """Tokens that were settled since the last call. Waits for the device: asked once per prefill, which does so too."""
    global _told
    if _differing is None:
        return 0
    total = int(_differing)
    new, _told = total - _told, total
    if new:
        logger.warning("%d sampled tokens differed between replicas; all went on with those of rank 0", new)
    return new
