"""Embeddings of this rank's rows: text looked up locally, media encoded where their frames were put, then sent."""

from collections.abc import Iterator

import torch

from sglang_mm.serving.media import MediaSource
from sglang_mm.serving.plan import PrefillPlan
from sglang_mm.types import Frame

PATCHES_PER_CALL = 65536  # bounds the vision tower's activations; a frame is never split


def embed_rows(model, plan: PrefillPlan, input_ids: torch.Tensor, forward_batch) -> torch.Tensor:
    """[t, H] for the t rows of this rank. input_ids: flat batch, with SGLang's hashes at media positions."""
    if model.mm_config.vision == "stock":
        with plan.sight.stage("vision"):
            return embed_whole(model, input_ids, forward_batch)[plan.rows]
    embed_tokens = model.model.get_input_embeddings()
    ids = input_ids[plan.rows]
    # hashes lie beyond the vocabulary; those rows are overwritten below
    embeds = embed_tokens(torch.where(ids < embed_tokens.num_embeddings, ids, 0))
    if not any(plan.exchange.encode):
        return embeds
    with plan.sight.stage("vision"):
        encoded = encode_frames(model, plan, embeds)
    with plan.sight.stage("exchange"):
        slots, media = plan.exchange.run(encoded, plan.transport)
        embeds[slots] = media
    return embeds


def encode_frames(model, plan: PrefillPlan, like: torch.Tensor) -> torch.Tensor:
    """Embeddings [tokens, H] of the frames this rank has to send, attention inside each frame.

    A frame that an earlier chunk encoded, or that the client sent encoded, does not meet the vision tower.
    """
    own = plan.exchange.encode[plan.rank]
    at_hand = [plan.at_hand(request, frame) for request, frame in own]
    fresh = _run_tower(model, plan, [pair for pair, rows in zip(own, at_hand) if rows is None], like)
    encoded = [next(fresh) if rows is None else rows.to(like) for rows in at_hand]
    plan.keep_cut_frames(encoded)
    return torch.cat(encoded) if encoded else like.new_empty(0, like.shape[1])


def _run_tower(model, plan: PrefillPlan, frames: list[tuple[int, Frame]], like: torch.Tensor) -> Iterator[torch.Tensor]:
    """Embeddings [frame.length, H] of one (request, frame) after another, from calls of bounded size."""
    for batch in _batches(plan, frames):
        sources = [plan.sources[request][frame.item] for request, frame in batch]
        own = [(source, frame.index) for source, (_, frame) in zip(sources, batch)]
        grid = torch.tensor([[1, source.h, source.w] for source in sources])
        encoded = model.visual(_pixels(own, like.device, model.visual.dtype), grid_thw=grid).to(like)
        yield from encoded.split([frame.length for _, frame in batch])


def _pixels(frames: list[tuple[MediaSource, int]], device, dtype: torch.dtype) -> torch.Tensor:
    """[patches, width] of (source, number of its frame) one behind the other, read and scaled frame by frame."""
    whole, at = None, 0
    for source, index in frames:
        pixels = source.pixels(index, device, dtype)
        if whole is None:
            whole = pixels.new_empty(sum(other.h * other.w for other, _ in frames), pixels.shape[1])
        whole[at : at + len(pixels)] = pixels
        at += len(pixels)
    return whole


def _batches(plan: PrefillPlan, frames: list[tuple[int, Frame]]) -> Iterator[list[tuple[int, Frame]]]:
    batch, patches = [], 0
    for request, frame in frames:
        source = plan.sources[request][frame.item]
        if batch and patches + source.h * source.w > PATCHES_PER_CALL:
            yield batch
            batch, patches = [], 0
        batch.append((request, frame))
        patches += source.h * source.w
    if batch:
        yield batch


def embed_whole(model, input_ids: torch.Tensor, forward_batch) -> torch.Tensor:
    """SGLang's own embedding of the flat batch [S, H], on every rank (`--vision stock`)."""
    from sglang.srt.managers import mm_utils

    return mm_utils.prepare_mm_inputs(input_ids, forward_batch, model.model, {}, model, None, None, {}, None)
