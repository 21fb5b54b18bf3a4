"""The independent reference: transformers' Qwen2.5-VL, given exactly what SGLang gave its model.

`generate()` is no reference: transformers 5.19 places the text that follows a video by the frame's height and width
alone and forgets its duration. A forward with SGLang's M-RoPE positions passed in is.
"""

from dataclasses import dataclass

import torch

from sglang_mm.pixels import StoredPatches


@dataclass(frozen=True)
class Prompt:
    """What SGLang's processor made of one request.

    input_ids: placeholders expanded. positions: int64 [3, S] (time, height, width). delta: added to a later token's
    index to get its position. media: transformers' pixel arguments (pixel_values, image_grid_thw, ...).
    """

    input_ids: list[int]
    positions: torch.Tensor
    delta: int
    media: dict[str, torch.Tensor]


def prompt_of(output) -> Prompt:
    """From SGLang's MultimodalProcessorOutput."""
    media: dict[str, list[torch.Tensor]] = {}
    for item in output.mm_items:
        kind = "_videos" if item.is_video() else ""
        grid = "video_grid_thw" if item.is_video() else "image_grid_thw"
        pixels = item.feature.all_pixels() if isinstance(item.feature, StoredPatches) else torch.as_tensor(item.feature)
        media.setdefault(f"pixel_values{kind}", []).append(pixels.float())
        media.setdefault(grid, []).append(item.model_specific_data[grid].reshape(-1, 3))
    return Prompt(
        list(output.input_ids),
        output.mrope_positions.clone(),
        int(output.mrope_position_delta.reshape(-1)[0]),
        {name: torch.cat(parts) for name, parts in media.items()},
    )


def text_prompt(input_ids: list[int]) -> Prompt:
    """A prompt without media: all three positions are the index."""
    return Prompt(list(input_ids), torch.arange(len(input_ids)).expand(3, -1), 0, {})


def load(model_path: str):
    """transformers' model in fp32 on CPU."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@torch.inference_mode()
def greedy(model, prompt: Prompt, new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy token ids and the log-probabilities they were chosen from, [new_tokens, vocabulary] fp32."""
    ids = torch.tensor([prompt.input_ids])
    kinds = torch.zeros_like(ids)
    kinds[ids == model.config.image_token_id] = 1
    kinds[ids == model.config.video_token_id] = 2
    step = {"input_ids": ids, "position_ids": prompt.positions[:, None], "mm_token_type_ids": kinds, **prompt.media}
    tokens, rows, cache = [], [], None
    for index in range(ids.shape[1], ids.shape[1] + new_tokens):
        out = model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        at = torch.full((3, 1, 1), index + prompt.delta)
        following = torch.tensor([[tokens[-1]]])
        step = {"input_ids": following, "position_ids": at, "mm_token_type_ids": torch.zeros_like(following)}
    return tokens, torch.stack(rows)
