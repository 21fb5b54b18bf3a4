"""The independent reference for sparse prefill: transformers' Qwen2.5-VL, its decoder's attention masked by the oracle.

    rows of a chunk -> q, k of a layer, all heads turned -> select or auto_select -> sets -> patterns/masks.py, [S, S]
                                                                                  out = softmax(masked q k^T * scale) v

The selection is the product's own, of one rank, on transformers' q and k; what it shows is decided token by token, and
no tile program, kernel or rank attends. Keys and values stay in transformers' cache; answers decode densely over them.
S tokens of the prompt, T rows computed now, R of them at once, K keys so far, H query heads, G K/V heads, D head dim,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sglang_mm.demo.huggingface import Prompt
from sglang_mm.modality import Medium, Wraps, family_of, map_from_ids
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Phases, Selection, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.plan import Plan
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import Report, auto_select, select
from sglang_mm.types import Modality, TokenMap

ATTENTION = "masked_by_the_oracle"
ROWS_AT_ONCE = 512
BLOCKS_TRIED = 4
Auto = Literal["auto"]
Decisions = list[tuple[Selection, Report | None]]
"""Of each layer; no report where the selection was made elsewhere."""


@dataclass(frozen=True)
class Made:
    """Selections that something else made, of each layer of each chunk, with the lists of all row blocks. For where
    two members of a set weigh the same but for rounding, and two programs therefore take another one."""

    chunks: Sequence[Sequence[Selection]]


@dataclass(frozen=True)
class Drop:
    """A planted error: in every chunk the mask of one unit of one layer loses the heaviest thing that was selected: a
    column, a class, a class difference, or a block of keys. Raises ValueError for a unit without any. What only rows
    before the last one lose does not show in the last layer: nothing looks at them any more."""

    layer: int
    unit: int = 0


@dataclass(frozen=True)
class Answer:
    """tokens: greedy. logprobs fp32 [new tokens, V]: what they were chosen from. chunks: what each chunk's layers
    decided. cache: keys and values of the prompt and of all tokens but the last."""

    tokens: list[int]
    logprobs: Tensor
    chunks: list[Decisions]
    token_map: TokenMap
    cache: object = field(repr=False)


@torch.inference_mode()
def answer(
    model,
    prompt: Prompt,
    plan: Plan | Auto | Made,
    new_tokens: int,
    *,
    stops: Sequence[int] = (),
    cached: Answer | None = None,
    prefix: int = 0,
    units: Sequence[tuple[int, ...]] | None = None,
    drop: Drop | None = None,
) -> Answer:
    """Sparse prefill, then new_tokens drawn greedily with dense attention.

    model: from `huggingface.load`. plan: "auto" selects without one, each head for itself unless `units` says
    otherwise. stops: where chunks end before the prompt does; class masses are handed from one to the next.
    cached, prefix: the first `prefix` tokens keep the keys and values of an earlier answer, however computed.
    """
    tokens, embeds_SM = token_map(model, prompt), _embed(model, prompt)
    cache = _kept(model, cached, prefix)
    sparse = _Sparse(tokens, plan, units, drop)
    bounds = [prefix, *stops, len(prompt.input_ids)]
    with _attention_of(model, ATTENTION):
        for start, stop in pairwise(bounds):
            sparse.begin(range(start, stop))
            hidden = _forward(model, embeds_SM[start:stop], prompt.positions[:, start:stop], cache, sparse)
        drawn, rows = [], []
        for index in range(bounds[-1], bounds[-1] + new_tokens):
            if drawn:
                embed = model.get_input_embeddings()(torch.tensor(drawn[-1:]))
                at = torch.full((3, 1), index - 1 + prompt.delta)
                hidden = _forward(model, embed, at, cache, _dense)
            rows.append(model.lm_head(hidden[-1]).float().log_softmax(-1))
            drawn.append(int(rows[-1].argmax()))
    return Answer(drawn, torch.stack(rows), sparse.chunks, tokens, cache)


@torch.inference_mode()
def decisions(model, prompt: Prompt, plan: Plan | Auto | Made) -> Decisions:
    """What each layer selects where all layers attend densely: much quicker than `answer`, for long prompts."""
    tokens, embeds_SM = token_map(model, prompt), _embed(model, prompt)
    sparse = _Sparse(tokens, plan, None, None)
    sparse.begin(range(len(tokens)))

    def select_and_attend(layer: int, q_HTD: Tensor, k_GKD: Tensor, v_GKD: Tensor, scale: float) -> Tensor:
        sparse.select(layer, q_HTD, k_GKD, scale)
        return scaled_dot_product_attention(q_HTD, k_GKD, v_GKD, is_causal=True, scale=scale, enable_gqa=True)

    with _attention_of(model, ATTENTION):
        _forward(model, embeds_SM, prompt.positions, _kept(model, None, 0), select_and_attend)
    return sparse.chunks[0]


def token_map(model, prompt: Prompt) -> TokenMap:
    """From the ids with placeholders, and the grids."""
    config = model.config
    kinds = {Modality.IMAGE: "image", Modality.VIDEO: "video"}
    media = [
        Medium(modality, tuple(grid))
        for modality, name in kinds.items()
        for grid in prompt.media.get(f"{name}_grid_thw", torch.empty(0, 3)).tolist()
    ]
    placeholders = {Modality.IMAGE: config.image_token_id, Modality.VIDEO: config.video_token_id}
    used = {modality: token for modality, token in placeholders.items() if token in prompt.input_ids}
    wraps = Wraps(config.vision_start_token_id, config.vision_end_token_id)
    return map_from_ids(family_of("qwen2_5_vl"), torch.tensor(prompt.input_ids), media, used, wraps)


class _Sparse:
    """Attention of a prompt's rows, chunk after chunk: each layer selects when its q and k are there."""

    def __init__(self, tokens: TokenMap, plan: Plan | Auto | Made, units, drop: Drop | None):
        self.tokens, self.plan, self.units, self.drop = tokens, plan, units, drop
        self.chunks: list[Decisions] = []

    def begin(self, chunk: range) -> None:
        self.rows = Shard(self.tokens, torch.arange(chunk.start, chunk.stop))
        self.keys = Shard(self.tokens, torch.arange(chunk.stop))
        self.chunk = chunk
        self.chunks.append([])

    def __call__(self, layer: int, q_HTD: Tensor, k_GKD: Tensor, v_GKD: Tensor, scale: float) -> Tensor:
        selection = self.select(layer, q_HTD, k_GKD, scale)
        out_HTD = torch.empty_like(q_HTD)
        group = q_HTD.shape[0] // k_GKD.shape[0]
        for number, unit in enumerate(selection.units):
            seen_TK = self._seen(unit)
            if self.drop == Drop(layer, number):
                weights_TK = sum(_weights(q_HTD[h], k_GKD[h // group], seen_TK, scale) for h in unit.heads)
                seen_TK = _without_heaviest(unit, self.tokens, weights_TK, self._seen)
            for head in unit.heads:
                out_HTD[head] = _attend(q_HTD[head], k_GKD[head // group], v_GKD[head // group], seen_TK, scale)
        return out_HTD

    def _seen(self, unit: Unit) -> Tensor:
        """bool [T, K]."""
        return unit_mask(unit, self.tokens)[self.chunk.start :, : self.chunk.stop][: len(self.rows)]

    def select(self, layer: int, q_HTD: Tensor, k_GKD: Tensor, scale: float) -> Selection:
        previous = self.chunks[-2][layer][1].class_masses if len(self.chunks) > 1 else None
        share = {"scale": scale, "chunk": self.chunk, "previous": previous}
        held = q_HTD.transpose(0, 1).contiguous(), k_GKD.transpose(0, 1).contiguous(), self.rows, self.keys
        if isinstance(self.plan, Made):
            self.chunks[-1].append((self.plan.chunks[len(self.chunks) - 1][layer], None))
        elif self.plan == "auto":
            units = self.units or [(head,) for head in range(len(q_HTD))]
            self.chunks[-1].append(auto_select(units, layer, *held, **share))
        else:
            self.chunks[-1].append(select(self.plan.units(layer), *held, theta=self.plan.theta, **share))
        return self.chunks[-1][-1][0]


def _dense(layer: int, q_HTD: Tensor, k_GKD: Tensor, v_GKD: Tensor, scale: float) -> Tensor:
    """The rows are the last ones."""
    group, (rows, keys) = q_HTD.shape[0] // k_GKD.shape[0], (q_HTD.shape[1], k_GKD.shape[1])
    seen_TK = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    heads = [_attend(q_TD, k_GKD[h // group], v_GKD[h // group], seen_TK, scale) for h, q_TD in enumerate(q_HTD)]
    return torch.stack(heads)


def _attend(q_TD: Tensor, k_KD: Tensor, v_KD: Tensor, seen_TK: Tensor, scale: float) -> Tensor:
    """One head; a tile of rows at a time, in fp64."""
    found = []
    for q_RD, seen_RK in zip(q_TD.split(ROWS_AT_ONCE), seen_TK.split(ROWS_AT_ONCE)):
        stop = int(seen_RK.any(0).nonzero()[-1]) + 1
        found.append((_weights(q_RD, k_KD[:stop], seen_RK[:, :stop], scale) @ v_KD[:stop].double()).to(q_TD.dtype))
    return torch.cat(found)


def _weights(q_TD: Tensor, k_KD: Tensor, seen_TK: Tensor, scale: float) -> Tensor:
    scores_TK = q_TD.double() @ k_KD.double().T * scale
    return scores_TK.masked_fill(~seen_TK, float("-inf")).softmax(dim=1)


def _without_heaviest(unit: Unit, tokens: TokenMap, weights_TK: Tensor, seen_of) -> Tensor:
    """The mask, bool [T, K], without the one thing whose loss takes most of the heads' attention."""
    lacking = [
        seen_of(replace(unit, panels=(*unit.panels[:n], replace(panel, chosen=less), *unit.panels[n + 1 :])))
        for n, panel in enumerate(unit.panels)
        for less in _one_less(panel.chosen, tokens, weights_TK.sum(0))
    ]
    if not lacking:
        raise ValueError(f"nothing was selected for {unit}: it cannot lose anything")
    return min(lacking, key=lambda seen_TK: float(weights_TK[seen_TK].sum()))


def _one_less(chosen: Chosen, tokens: TokenMap, weights_K: Tensor) -> Iterator[Chosen]:
    """The sets without the heaviest column, the heaviest class, any one shift, any one of the heaviest blocks: rows of
    the block itself may give it most."""
    if isinstance(chosen, Lines) and len(chosen.columns):
        yield replace(chosen, columns=_but(chosen.columns, weights_K[chosen.columns].argmax()))
    if isinstance(chosen, Phases):
        class_K = tokens.classes(chosen.axis).of_token[: len(weights_K)]
        if len(chosen.classes):
            of_each = torch.stack([weights_K[class_K == each].sum() for each in chosen.classes])
            yield replace(chosen, classes=_but(chosen.classes, of_each.argmax()))
        for n in range(len(chosen.shifts)):
            yield replace(chosen, shifts=_but(chosen.shifts, n))
    if isinstance(chosen, BlockSet):
        of_each = torch.stack([part.sum() for part in weights_K.split(BLOCK)])
        for block in of_each.topk(min(BLOCKS_TRIED, len(of_each))).indices.tolist():
            yield _without_block(chosen, block)


def _but(members: Tensor, at: Tensor | int) -> Tensor:
    return members[torch.arange(len(members)) != at]


def _without_block(listed: BlockSet, block: int) -> BlockSet:
    """No list has it, but that of its own rows: a row without any key has no attention."""
    row = listed.row_blocks.repeat_interleave(listed.ptr.diff())
    kept = (listed.key_blocks != block) | (row == block)
    ptr = pad(kept.cumsum(0), (1, 0))[listed.ptr]
    return BlockSet(listed.row_blocks, ptr, listed.key_blocks[kept])


def _embed(model, prompt: Prompt) -> Tensor:
    """[S, M]: of text, with what the vision tower makes of the media at their placeholders."""
    ids = torch.tensor(prompt.input_ids)
    embeds_SM = model.get_input_embeddings()(ids).clone()
    for kind, suffix, token in (("image", "", "image_token_id"), ("video", "_videos", "video_token_id")):
        pixels = prompt.media.get(f"pixel_values{suffix}")
        if pixels is not None:
            features = getattr(model, f"get_{kind}_features")
            parts = features(pixels, prompt.media[f"{kind}_grid_thw"]).pooler_output
            embeds_SM[ids == getattr(model.config, token)] = torch.cat(parts)
    return embeds_SM


def _kept(model, cached: Answer | None, prefix: int):
    from transformers import DynamicCache

    if cached is None:
        return DynamicCache(config=model.config.text_config)
    cache = deepcopy(cached.cache)
    cache.crop(prefix)
    return cache


def _forward(model, embeds_TM: Tensor, positions: Tensor, cache, attend) -> Tensor:
    """[T, M] of the last layer; `attend` is what every layer's attention calls."""
    decoder = model.model.language_model
    rows = {"inputs_embeds": embeds_TM[None], "position_ids": positions[:, None]}
    no_mask = {"full_attention": None}
    out = decoder(**rows, past_key_values=cache, use_cache=True, attention_mask=no_mask, attend=attend)
    return out.last_hidden_state[0]


@contextmanager
def _attention_of(model, name: str) -> Iterator[None]:
    """The decoder's attention; the vision tower keeps its own."""
    from transformers import AttentionInterface

    def call(module, query, key, value, attention_mask, scaling, attend, **_):
        out_HTD = attend(module.layer_idx, query[0], key[0], value[0], scaling)
        return out_HTD.transpose(0, 1)[None], None

    AttentionInterface.register(name, call)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": name})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
