"""Ranks sample from the same logits; should two of them draw different tokens, they settle on one and it is counted.

A replica that went on with another token would compute other keys, and the ring would mix them. So would one of the T
ranks of a replica: first these take the token of their first one, then the replicas that of replica 0.
"""

import logging

import torch

from sglang_mm.parallel.transport import Transport

logger = logging.getLogger(__name__)
_circles: list[Transport] = []  # of this process, in the order in which they settle
_differing: torch.Tensor | None = None  # on the device, so that a decode step does not wait for it
_told = 0


def join(*circles: Transport | None) -> None:
    """Those who have to agree with this process: the ranks of its replica, of its ring; None or alone: nobody."""
    global _differing, _told
    _circles[:] = [circle for circle in circles if circle is not None and circle.size > 1]
    _told, _differing = 0, None
    if _circles:
        _differing = torch.zeros((), dtype=torch.int64, device=_circles[0].device)


def settle(original, sampler, token_ids: torch.Tensor, sampling_info) -> None:
    """Around-hook on Sampler._sync_token_ids_across_tp. token_ids [B] of this rank, replaced by those settled on."""
    for circle in _circles:
        drawn = torch.stack(_drawn_by_all(token_ids, circle))
        _differing.add_((drawn != drawn[0]).any(0).sum())
        token_ids.copy_(drawn[0])
    original(sampler, token_ids, sampling_info)


def _drawn_by_all(token_ids: torch.Tensor, circle: Transport) -> list[torch.Tensor]:
    ranks = circle.size
    return circle.all_to_all([token_ids] * ranks, [len(token_ids)] * ranks, "sampled tokens", kind="checks")


def differing_tokens() -> int:
    """Tokens that were settled since the last call, as this rank saw it. Waits for the device."""
    global _told
    if _differing is None:
        return 0
    total = int(_differing)
    new, _told = total - _told, total
    if new:
        logger.warning("%d sampled tokens differed between ranks; all went on with those of the first", new)
    return new
