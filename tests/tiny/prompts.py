"""Prompts with a video for the Hugging Face model, whose own M-RoPE is not the released one for videos."""

from dataclasses import dataclass, replace

import torch

from sglang_mm.tiny.tokenizer import SPECIAL_IDS

VIDEO_PAD = SPECIAL_IDS["<|video_pad|>"]
STEP = 2  # temporal positions between two grids: tokens_per_second 2, one second per grid


@dataclass(frozen=True)
class Prompt:
    """ids int64 [S]; pixels float32 [patches, 1176]; grid int64 [videos, 3], in patches; positions int64 [3, S]."""

    ids: torch.Tensor
    pixels: torch.Tensor
    grid: torch.Tensor

    @property
    def is_video(self) -> torch.Tensor:
        return self.ids == VIDEO_PAD

    @property
    def positions(self) -> torch.Tensor:
        """Text counts on from the largest position so far; a video is a grid of t, h, w from there."""
        columns, start, i = [], 0, 0
        grids = iter(self.grid.tolist())
        while i < len(self.ids):
            piece = torch.full((3, 1), start)
            if self.is_video[i]:
                t, h, w = next(grids)
                axes = torch.arange(t) * STEP, torch.arange(h // 2), torch.arange(w // 2)
                piece = start + torch.cartesian_prod(*axes).T
            columns.append(piece)
            start, i = int(piece.max()) + 1, i + piece.shape[1]
        return torch.cat(columns, dim=1)

    def then(self, token: int) -> "Prompt":
        return replace(self, ids=torch.cat([self.ids, torch.tensor([token])]))


def video_prompt(processor, frames, *, before: str = "", after: str = "What # moves?") -> Prompt:
    """frames uint8 [F, height, width, 3] between two texts of one user message, ready for the answer."""
    parts = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": after}]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = processor(text=[text], videos=[frames], return_tensors="pt")
    return Prompt(batch["input_ids"][0], batch["pixel_values_videos"], batch["video_grid_thw"])


@torch.no_grad()
def forward(model, prompt: Prompt, *, keep: torch.Tensor | None = None, attentions: bool = False):
    """The model's output for `prompt`; keep: bool [S], keys that exist."""
    keep = torch.ones_like(prompt.ids, dtype=torch.bool) if keep is None else keep
    return model(
        input_ids=prompt.ids[None],
        attention_mask=keep[None].long(),
        position_ids=prompt.positions[:, None],
        mm_token_type_ids=2 * prompt.is_video[None].long(),
        pixel_values_videos=prompt.pixels,
        video_grid_thw=prompt.grid,
        use_cache=False,
        output_attentions=attentions,
    )


def log_probs(model, prompt: Prompt, **options) -> torch.Tensor:
    """float32 [S, V]."""
    return forward(model, prompt, **options).logits[0].log_softmax(-1)
