"""The estimates of the online selection computed from the whole rows x keys table of probabilities, in fp64.

H query heads, R probe rows, S tokens, X bins or classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.chosen import Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.peers import Alone
from sglang_mm.types import Classes, Run, TokenMap


def hold(q_SHD: Tensor, k_SGD: Tensor, tokens: TokenMap, scale: float = 1.0, chunk: range | None = None) -> Held:
    """One rank with everything; of a chunk, its rows and the keys before its end."""
    chunk = chunk or range(len(tokens))
    rows, keys = torch.arange(chunk.start, chunk.stop), torch.arange(chunk.stop)
    return Held(q_SHD[rows], k_SGD[keys], Shard(tokens, rows), Shard(tokens, keys), scale, Alone(), chunk)


def scores(q_SHD: Tensor, k_SGD: Tensor, rows: range, scale: float = 1.0) -> Tensor:
    """fp64 [H, R, S], -inf after the row."""
    row_R1, key_S = torch.arange(rows.start, rows.stop)[:, None], torch.arange(len(k_SGD))
    k_SHD = k_SGD.double().repeat_interleave(q_SHD.shape[1] // k_SGD.shape[1], dim=1)
    scores_HRS = torch.einsum("rhd,shd->hrs", q_SHD[rows.start : rows.stop].double(), k_SHD) * scale
    return scores_HRS.masked_fill(key_S > row_R1, float("-inf"))


def probabilities(q_SHD: Tensor, k_SGD: Tensor, rows: range, scale: float = 1.0) -> Tensor:
    return scores(q_SHD, k_SGD, rows, scale).softmax(dim=-1)


def by_distance(p_RS: Tensor, rows: range, bins: int) -> Tensor:
    """[X]: mass in bins of 64 distances."""
    distance_RS = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(p_RS.shape[1])
    causal_RS = distance_RS >= 0
    return torch.bincount(distance_RS[causal_RS] // 64, p_RS[causal_RS], minlength=bins)


def by_class(p_RS: Tensor, classes: Classes) -> Tensor:
    """[X]: mass of the keys of each class."""
    class_S = classes.of_token[: p_RS.shape[1]].long()
    return torch.bincount(class_S[class_S >= 0], p_RS.sum(0)[class_S >= 0], minlength=len(classes))


def by_difference(p_RS: Tensor, rows: range, tokens: TokenMap, classes: Classes, sink: int, window: int) -> Tensor:
    """[X]: mass by (class of row - class of key) inside an item, beyond sink and window, at its name space's start."""
    found = torch.zeros(len(classes), dtype=torch.float64)
    class_S = classes.of_token.tolist()
    for r, row in enumerate(rows):
        for key in range(sink, row - window + 1):
            if class_S[row] >= 0 and class_S[key] >= 0 and tokens.item[row] == tokens.item[key]:
                space = int(classes.spaces[class_S[row]])
                start, stop = classes.starts[space], classes.starts[space + 1]
                found[start + (class_S[row] - class_S[key]) % (stop - start)] += p_RS[r, key]
    return found


def recall(p_HRS: Tensor, rows: range, unit: Unit, tokens: TokenMap) -> float:
    """Mean mass of what the unit's mask shows, all rows taken as sparse ones."""
    seen_RS = unit_mask(unit, tokens, sparse_rows=True)[rows.start : rows.stop, : p_HRS.shape[2]]
    return float((p_HRS[list(unit.heads)] * seen_RS).sum(-1).mean())


def layout_shards(runs: Sequence[Run], ranks: int) -> list[Tensor]:
    return list(make_layout(runs, ranks).rows)
