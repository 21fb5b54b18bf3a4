"""Blocks: per block of 128 rows the heaviest blocks of keys, by the attention of mean queries to mean keys.

    row block r, pooled over the rows of the panel's modality        softmax over key blocks 0 .. r, pooled alike
    own, held by this rank alone | shared by several ranks, or with probe rows

Shared row blocks are summed over the ranks and scored in the same batch everywhere, so that all ranks that need the
list of a block have the same one. The others are nobody else's business.
B row blocks, E key blocks, H query heads, G K/V heads, D head dim, U units, Z slots as in held.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.kernels.probe import scores_at_once
from sglang_mm.patterns.chosen import BLOCK, BlockSet
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select.heaviest import rank_key
from sglang_mm.patterns.select.held import Heads, Held, Slots, make_slots
from sglang_mm.patterns.select.masses import Want
from sglang_mm.patterns.select.probe import Probe
from sglang_mm.types import Modality

POOLED_AT_ONCE = 64  # blocks: 8192 tokens are converted to fp32 at a time


@dataclass(frozen=True, eq=False)
class _Pool:
    """blocks int64 [B], ascending; mean [B, heads, D]; counts int64 [B], tokens that the mean is over."""

    blocks: Tensor
    mean: Tensor
    counts: Tensor

    def until(self, stop: int) -> "_Pool":
        return _Pool(self.blocks[:stop], self.mean[:stop], self.counts[:stop])


def choose_blocks(held: Held, probe: Probe, units: Sequence[Heads], wants: Sequence[Want]) -> list[BlockSet]:
    """Per want the blocks for this rank's rows of the probe's modality, and for the probe's.

    A want against keys of one modality pools these alone and keeps the threshold's share of their attention: where
    every pair of modalities keeps its share, so does the whole row.
    """
    shared, own, listed_B = _pool_rows(held, probe)
    found: list[BlockSet | None] = [None] * len(wants)
    for modality in dict.fromkeys(want.keys for want in wants):
        numbers = [number for number, want in enumerate(wants) if want.keys == modality]
        keys = _pool_keys(held, modality)
        parts = _listed(held, units, [wants[n] for n in numbers], (shared, own), keys, listed_B)
        for number, (counts_B, key_blocks) in zip(numbers, parts):
            found[number] = _merge(listed_B, torch.isin(listed_B, shared.blocks), counts_B, key_blocks)
    return found


def _pool(x_THD: Tensor, shard: Shard, modality: Modality | None, dtype: torch.dtype) -> _Pool:
    """The shard's tokens of one modality; `mean` holds sums."""
    members = shard.modality() == modality if modality is not None else torch.ones_like(shard.positions)
    members = members.nonzero().flatten()
    blocks, counts = (shard.positions[members] // BLOCK).unique_consecutive(return_counts=True)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
    sums = x_THD.new_zeros(len(blocks), *x_THD.shape[1:], dtype=dtype)
    start, stop = (int(members[0]), int(members[-1]) + 1) if len(members) else (0, 0)
    in_one_run = x_THD[start:stop] if stop - start == len(members) else None  # most prompts: no copy
    for first in range(0, len(blocks), POOLED_AT_ONCE):
        part = slice(first, min(first + POOLED_AT_ONCE, len(blocks)))
        chosen = slice(ends[part.start], ends[part.stop])
        tokens = in_one_run[chosen] if in_one_run is not None else x_THD[members[chosen]]
        tokens = tokens.to(dtype).flatten(1)
        sums[part] = torch.segment_reduce(tokens, "sum", lengths=counts[part], axis=0).view_as(sums[part])
    return _Pool(blocks, sums, counts)


def _pool_keys(held: Held, modality: Modality | None) -> _Pool:
    """All key blocks up to the chunk's end, over all ranks."""
    own = _pool(held.k_KGD, held.keys, modality, held.dtype)
    blocks = -(-held.chunk.stop // BLOCK)
    sums = own.mean.new_zeros(blocks, *own.mean.shape[1:])
    counts = torch.zeros(blocks, dtype=torch.int64, device=held.device)
    sums[own.blocks], counts[own.blocks] = own.mean, own.counts
    sums, counts = held.peers.sum(sums), held.peers.sum(counts)
    mean = sums / counts.clamp(min=1)[:, None, None]
    return _Pool(torch.arange(blocks, device=held.device), mean, counts)


def _pool_rows(held: Held, probe: Probe) -> tuple[_Pool, _Pool, Tensor]:
    """Shared row blocks, the same on all ranks; row blocks of this rank alone; and those to list here, ascending."""
    own = _pool(held.q_THD, held.rows, probe.modality, held.dtype)
    holders = torch.zeros(-(-held.chunk.stop // BLOCK), dtype=torch.int64, device=held.device)
    holders[own.blocks] = 1
    holders = held.peers.sum(holders.clone())
    is_probe = torch.zeros_like(holders, dtype=torch.bool)
    is_probe[probe.rows.start // BLOCK : (probe.rows.stop - 1) // BLOCK + 1] = True

    shared = ((holders > 1) | is_probe).nonzero().flatten()
    is_shared_B = torch.isin(own.blocks, shared)
    sums = own.mean.new_zeros(len(shared), *own.mean.shape[1:])
    counts = torch.zeros_like(shared)
    place = torch.searchsorted(shared, own.blocks[is_shared_B])
    sums[place], counts[place] = own.mean[is_shared_B], own.counts[is_shared_B]
    sums, counts = held.peers.sum(sums), held.peers.sum(counts)
    alone = own.blocks[~is_shared_B], own.mean[~is_shared_B], own.counts[~is_shared_B]
    listed = torch.cat([own.blocks, is_probe.nonzero().flatten()]).unique()
    return _mean(shared, sums, counts), _mean(*alone), listed


def _mean(blocks: Tensor, sums: Tensor, counts: Tensor) -> _Pool:
    return _Pool(blocks, sums / counts.clamp(min=1)[:, None, None], counts)


def _listed(
    held: Held, units: Sequence[Heads], wants: Sequence[Want], rows: Sequence[_Pool], keys: _Pool, listed_B: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per want int64 [B], how many key blocks each block of listed_B takes, and these, int32 [n], in order of `rows`.

    Where all heads keep most blocks, these lists are by far the largest thing that a choice makes: hence int32, and no
    sort of what is in order already.
    """
    scored = sorted({want.unit for want in wants})
    slots = make_slots([units[number] for number in scored], held)
    unit_W = torch.tensor([scored.index(want.unit) for want in wants], device=held.device)
    threshold_W = torch.tensor([want.pattern.threshold for want in wants], device=held.device, dtype=held.dtype)
    counts_WB = torch.zeros(len(wants), len(keys.blocks), dtype=torch.int64, device=held.device)
    is_listed_B = torch.zeros_like(counts_WB[0], dtype=torch.bool).index_fill_(0, listed_B, True)
    found = []
    for pool in rows:
        at_once = max(1, scores_at_once(held.device) // (len(slots) * len(keys.blocks)))
        for blocks, mean in zip(pool.blocks.split(at_once), pool.mean.split(at_once)):
            before = keys.until(int(blocks[-1]) + 1 if len(blocks) else 1)
            p_UBE = slots.per_unit(_attention(held, slots, blocks, mean, before)) / slots.weights.sum(1)[:, None, None]
            is_kept_WBE = _smallest_sets(p_UBE[unit_W], threshold_W)
            is_kept_WBE[..., 0] = True
            is_kept_WBE.scatter_(2, blocks[None, :, None].expand(len(wants), -1, 1), True)
            is_kept_WBE &= is_listed_B[blocks, None]
            counts_WB[:, blocks] = is_kept_WBE.sum(2)
            kept = is_kept_WBE.flatten().nonzero().flatten().remainder_(len(before.blocks)).int()
            found.append(kept.split(is_kept_WBE.flatten(1).sum(1).tolist()))
    for counts_B, parts in zip(counts_WB[:, listed_B], zip(*found)):
        yield counts_B, torch.cat(parts)


def _merge(row_blocks: Tensor, is_shared_B: Tensor, counts_B: Tensor, key_blocks: Tensor) -> BlockSet:
    """key_blocks: those of the shared row blocks, then those of the others."""
    is_shared = is_shared_B.repeat_interleave(counts_B)
    merged = torch.empty(len(key_blocks), dtype=torch.int64, device=key_blocks.device)
    of_shared, of_others = key_blocks.tensor_split([int(counts_B[is_shared_B].sum())])
    merged.masked_scatter_(is_shared, of_shared.long()).masked_scatter_(~is_shared, of_others.long())
    return BlockSet(row_blocks, torch.nn.functional.pad(counts_B.cumsum(0), (1, 0)), merged)


def _attention(held: Held, slots: Slots, blocks_B: Tensor, mean_BHD: Tensor, keys: _Pool) -> Tensor:
    """[Z, B, E]: softmax over the key blocks up to the row block, each weighted by its keys; 0 where it has none."""
    k_GDE = keys.mean[:, slots.kv_heads].permute(1, 2, 0)
    scores = (slots.arrange(mean_BHD) @ k_GDE * held.scale).view(len(slots), len(blocks_B), len(keys.blocks))
    hidden_BE = (keys.blocks > blocks_B[:, None]) | (keys.counts == 0)
    scores = (scores + keys.counts.log()).masked_fill(hidden_BE, float("-inf"))
    return scores.softmax(dim=-1).nan_to_num(0)  # a row block before all keys of the modality


def _smallest_sets(p_WBE: Tensor, threshold_W: Tensor) -> Tensor:
    """bool [W, B, E]: the fewest blocks whose p reaches the threshold; with a threshold of 1, all that have any."""
    order = rank_key(p_WBE, torch.arange(p_WBE.shape[2], device=p_WBE.device)).argsort(dim=2, descending=True)
    falling = p_WBE.gather(2, order)
    before = falling.cumsum(2) - falling
    threshold = threshold_W[:, None, None].masked_fill(threshold_W[:, None, None] >= 1, float("inf"))
    return torch.zeros_like(p_WBE, dtype=torch.bool).scatter_(2, order, (before < threshold) & (falling > 0))
