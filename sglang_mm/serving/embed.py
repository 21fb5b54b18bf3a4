"""Embeddings of this rank's rows: text looked up locally, media encoded where their frames were put, then sent."""

import torch

from sglang_mm.serving.plan import PrefillPlan

PATCHES_PER_CALL = 65536  # bounds the vision tower's activations; a frame is never split


def embed_rows(model, plan: PrefillPlan, input_ids: torch.Tensor, forward_batch) -> torch.Tensor:
    """[t, H] for the t rows of this rank. input_ids: flat batch, with SGLang's hashes at media positions."""
    if model.mm_config.vision == "stock":
        return embed_whole(model, input_ids, forward_batch)[plan.rows]
    embed_tokens = model.model.get_input_embeddings()
    ids = input_ids[plan.rows]
    # hashes lie beyond the vocabulary; those rows are overwritten below
    embeds = embed_tokens(torch.where(ids < embed_tokens.num_embeddings, ids, 0))
    if not any(plan.exchange.encode):
        return embeds
    slots, media = plan.exchange.run(encode_frames(model, plan, embeds), plan.transport)
    embeds[slots] = media
    return embeds


def encode_frames(model, plan: PrefillPlan, like: torch.Tensor) -> torch.Tensor:
    """The vision tower over this rank's frames, attention inside each frame: [tokens of those frames, H]."""
    encoded, batch, patches = [], [], 0
    for request, frame in plan.exchange.encode[plan.rank]:
        source = plan.sources[request][frame.item]
        rows = source.rows(frame.index, frame.length)
        if batch and (source.embeddings is not None or patches + len(rows) > PATCHES_PER_CALL):
            encoded.append(_run_tower(model, batch, like))
            batch, patches = [], 0
        if source.embeddings is not None:
            encoded.append(rows.to(like))
        else:
            batch.append((rows, source.h, source.w))
            patches += len(rows)
    if batch:
        encoded.append(_run_tower(model, batch, like))
    return torch.cat(encoded) if encoded else like.new_empty(0, like.shape[1])


def _run_tower(model, batch: list[tuple[torch.Tensor, int, int]], like: torch.Tensor) -> torch.Tensor:
    """batch: (patches of a frame, its height and width in patches)."""
    pixels = torch.cat([rows for rows, _, _ in batch]).to(device=like.device, dtype=model.visual.dtype)
    grid = torch.tensor([[1, h, w] for _, h, w in batch])
    return model.visual(pixels, grid_thw=grid).to(like)


def embed_whole(model, input_ids: torch.Tensor, forward_batch) -> torch.Tensor:
    """SGLang's own embedding of the flat batch [S, H], on every rank (`--vision stock`)."""
    from sglang.srt.managers import mm_utils

    return mm_utils.prepare_mm_inputs(input_ids, forward_batch, model.model, {}, model, None, None, {}, None)
