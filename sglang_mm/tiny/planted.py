"""Attention heads whose pattern is known by construction: biases, rotary frequencies, reserved channels, no training.

| head | name | a row attends to |
|---|---|---|
| 0 | grid | video row: the same place (h, w) in every frame so far |
| 1 | column | video row: the same column w, any row h, every frame so far |
| 2 | local | video row: its own frame, mostly near itself; text row: itself |
| 3 | text | every row: text tokens, chosen among them by content |
| 4 | sink | every row: the first token |
| 5 | vertical | every row: the tokens `#` and `<|vision_start|>`, wherever they are |
| 6 | text_to_video | text row: media tokens, chosen among them by content; media row: the first token |
| 7 | unstructured | every row: all tokens, chosen by content |

With q and k turned by M-RoPE, the logit of query x and key y is a sum over the rotary pairs j, each of one axis a(j):

    logit(x, y) = s * sum_j q_j k_j cos(f_j * (pos_a(j)(x) - pos_a(j)(y)))        s = m^2 / sqrt(head_dim)

Position heads (0, 1, 2): k_j = KEY for every token and q_j = A_j / (s * KEY), both by biases, so that the logit
sum_j A_j cos(f_j d_j) depends on distances d alone and is largest where they are 0; A_j = 0 leaves an axis free.
Positions h and w count rows and columns of merged patches, t counts 2 per second of video.
Four frequencies per axis keep the sum from recurring: `grid` loses at least 4.2 one column or 4.9 ten rows away, which
leaves 0.95 of the softmax on the pattern for frames up to 40 x 40. `local` keeps 0.93 within a frame among 256 of them.

Content heads (3, 4, 5, 6): embeddings (for media tokens, the bias of the vision tower's last layer) write MARK into a
reserved residual channel and no layer writes it again; k copies it after RMSNorm, whose divisor stays within 0.6..1.6
over two layers; q is a bias. The logit is A / divisor, large enough to beat a million other members of the softmax.
`text`, `text_to_video` and `unstructured` add random projections of both tokens.
The pairs they use must not turn: f_j ~ 0. That and frequencies in 0.38..1 for the position heads do not fit one
geometric series, so the checkpoint uses YaRN, as Qwen2.5-VL's own recipe for long inputs does: pairs 0..11 keep
f_j = 4^(-j/16), pairs 12..15 are slowed down by 65536 (5e-6: 1 radian per 200,000 positions), and cos and sin carry
m = 0.1 ln(65536) + 1.

    rotary pair  0  1  2  3 | 4  5  6  7 | 8  9 10 11 | 12   13      14      15      each pair has an x and a y half:
    axis             t      |     h      |     w      |  w, unturned                 head dims j and 16 + j
    k, x halves     KEY     |    KEY     |    KEY     | bos  column  vision  random
    k, y halves      0      |     0      |     0      |      random

All kv heads carry the same kind of key, so the pattern of a head does not depend on how heads are grouped.
Suffixes: H heads, D head dims, M channels of the residual stream.
"""

import math

import torch

HEADS, HEAD_DIM = 8, 32
HIDDEN = HEADS * HEAD_DIM
PATTERNS = ("grid", "column", "local", "text", "sink", "vertical", "text_to_video", "unstructured")

RESERVED = 4  # leading channels of the residual stream
ONE, BOS_MARK, COLUMN_MARK, VISION_MARK = range(RESERVED)
MARK = 4.0

POSITION_PAIRS, PAIRS_PER_AXIS = 12, 4
SLOWDOWN, LEARNT_POSITIONS = 65536.0, 16
BOUNDARY_TURNS = 0.94  # turns that a pair of index 11.5 makes in LEARNT_POSITIONS: faster pairs keep their frequency
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 4.0,
    "mrope_section": [4, 4, 8],
    "factor": SLOWDOWN,
    "original_max_position_embeddings": LEARNT_POSITIONS,
    "beta_fast": BOUNDARY_TURNS,
    "beta_slow": BOUNDARY_TURNS,
}
LOGIT_SCALE = (0.1 * math.log(SLOWDOWN) + 1) ** 2 / math.sqrt(HEAD_DIM)

KEY = 4.0
MARK_DIMS = {BOS_MARK: 12, COLUMN_MARK: 13, VISION_MARK: 14}
RANDOM_DIMS = [15, 28, 29, 30, 31]
CONTENT_SPREAD = 1.0  # gives content logits a standard deviation of about 1.8

POSITION_LOGITS = {"grid": (0, 7, 11), "column": (0, 0, 11), "local": (16, 2, 2)}  # A_j of each pair of axes t, h, w
MARK_LOGITS = {
    "sink": (BOS_MARK, 32),
    "vertical": (COLUMN_MARK, 32),
    "text_to_video": (VISION_MARK, 20),
    "text": (VISION_MARK, -28),
}
OF_MEDIA_ROWS = {
    "text_to_video": {VISION_MARK: -48, BOS_MARK: 80}
}  # added for rows with VISION_MARK, over their divisor
BY_CONTENT = ("text", "text_to_video", "unstructured")
LOUD, SOFT = 2.0, 0.5  # averages over many tokens are small: without this the last token alone decides the next


def planted_heads(layers: int = 2) -> dict[tuple[int, int], str]:
    """(layer, query head) -> name of its pattern, for a checkpoint of `layers` layers. Every layer has all of them."""
    return {(layer, head): name for layer in range(layers) for head, name in enumerate(PATTERNS)}


@torch.no_grad()
def plant(attention, kv_heads: int) -> None:
    """Overwrite q and k of one decoder layer's attention, keeping the random rows that content heads need; scale o."""
    plant_keys(attention.k_proj.weight.view(kv_heads, HEAD_DIM, HIDDEN), attention.k_proj.bias.view(kv_heads, HEAD_DIM))
    plant_queries(attention.q_proj.weight.view(HEADS, HEAD_DIM, HIDDEN), attention.q_proj.bias.view(HEADS, HEAD_DIM))
    for head, name in enumerate(PATTERNS):
        attention.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM)[:, head] *= LOUD if name in BY_CONTENT else SOFT


def plant_keys(weight_HDM: torch.Tensor, bias_HD: torch.Tensor) -> None:
    keep_only(weight_HDM, RANDOM_DIMS)
    bias_HD.zero_()
    bias_HD[:, :POSITION_PAIRS] = KEY
    for channel, dim in MARK_DIMS.items():
        weight_HDM[:, dim, channel] = 1


def plant_queries(weight_HDM: torch.Tensor, bias_HD: torch.Tensor) -> None:
    keep_only(weight_HDM, RANDOM_DIMS)
    bias_HD.zero_()
    for head, name in enumerate(PATTERNS):
        weight_HDM[head] *= CONTENT_SPREAD if name in BY_CONTENT else 0
        for axis, logit in enumerate(POSITION_LOGITS.get(name, ())):
            pairs = slice(axis * PAIRS_PER_AXIS, (axis + 1) * PAIRS_PER_AXIS)
            bias_HD[head, pairs] = logit / (KEY * LOGIT_SCALE)
        if name in MARK_LOGITS:
            channel, logit = MARK_LOGITS[name]
            bias_HD[head, MARK_DIMS[channel]] = logit / (MARK * LOGIT_SCALE)
        for channel, logit in OF_MEDIA_ROWS.get(name, {}).items():
            weight_HDM[head, MARK_DIMS[channel], VISION_MARK] = logit / (MARK**2 * LOGIT_SCALE)


def keep_only(weight_HDM: torch.Tensor, dims: list[int]) -> None:
    """Zero all other head dims, and what the reserved channels would add to these."""
    kept = weight_HDM[:, dims].clone()
    kept[..., :RESERVED] = 0
    weight_HDM.zero_()
    weight_HDM[:, dims] = kept
