"""A unit's mask in the order in which kernels compute it: the tiles of its programs, spread out pair by pair.

    keys      raw, in order of the prompt    lines, as a list       M full tile: all pairs are seen
    rows    M M . . . .                    M                        m partial tile, a seen pair
            M M m . . .                    M m                      x partial tile, a pair that is computed and hidden
            m x M m . .                    M m                      . not computed
    dense   M M M M M m

R rows and N keys of a program in its own order; V pairs of a row tile and a key tile, of at most B rows and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK, Selection, Unit
from sglang_mm.patterns.pictures.parts import Part, part_of_pairs
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.patterns.program.ragged import nth
from sglang_mm.patterns.program.shard import Seams, Tiles
from sglang_mm.patterns.program.sources import ByClass, Raw, Source, key_tiles
from sglang_mm.types import Modality, TileProgram, TokenMap


class State(IntEnum):
    """What happens to a pair. Where a picture shows several pairs as one pixel, the largest is seen."""

    SKIPPED = 0
    HIDDEN = 1
    PARTIAL = 2
    FULL = 3


@dataclass(frozen=True, eq=False)
class Permuted:
    """One program of one unit.

    rows int64 [R], keys int64 [N]: positions in the prompt. state_RN: uint8 of State. row_groups, key_groups: (name,
    how many rows or keys), side by side. full, partial: pairs of a row tile and a key tile that a kernel multiplies.
    """

    rows: Tensor
    keys: Tensor
    state_RN: Tensor
    row_groups: tuple[tuple[str, int], ...]
    key_groups: tuple[tuple[str, int], ...]
    full: int
    partial: int


def permuted(unit: Unit, tokens: TokenMap, tile: int = BLOCK) -> tuple[Permuted, ...]:
    """One entry per program that has rows, for one rank with the whole prompt. Memory is O(S * S), as for `unit_mask`.

    tile: rows and keys per tile, 1 .. 128. Raises ConfigError for another tile.
    """
    shard = Shard(tokens, torch.arange(len(tokens), device=tokens.modality.device))
    compiled = compile_rows(Selection((unit,), len(unit.heads)), shard, tile=tile)
    is_dense_S = part_of_pairs(unit, tokens).diagonal() == Part.DENSE_ROWS
    by_modality = any(panel.rows is not None for panel in unit.panels)
    found = []
    for rows, program in zip(compiled, compile_piece(compiled, shard, tile=tile)):
        row_R = _rows_in_order(program)
        if not len(row_R):
            continue
        rest = " by class" if isinstance(rows.sources[0], ByClass) else ""
        row_names = [(0, name + rest) for name in _row_names(row_R, tokens, is_dense_S, by_modality)]
        key_names = _key_names(rows.sources, key_tiles(rows.sources, shard, tile))
        visits = _visits(program)
        full = int((visits[2] < 0).sum())
        groups = _runs(row_names, [1] * len(row_names)), _runs(key_names, program.key_ptr.diff().tolist())
        state_RN = _spread_out(program, visits)
        found.append(Permuted(row_R, program.keys.long(), state_RN, *groups, full, program.visits - full))
    return tuple(found)


def tiles_touched(seen_SS: Tensor, tile: int) -> int:
    """Tiles of tile x tile pairs, in order of the prompt, in which any pair is seen. seen_SS: bool [S, S]."""
    padded = torch.nn.functional.pad(seen_SS, (0, -len(seen_SS) % tile, 0, -len(seen_SS) % tile))
    blocks = len(padded) // tile
    return int(padded.view(blocks, tile, blocks, tile).any(3).any(1).sum())


def _key_names(sources: Sequence[Source], tiles: Tiles) -> list[tuple[int, str]]:
    """(source, its name) of each tile of keys."""
    if isinstance(sources[0], ByClass):
        return [(0, "keys by class")] * len(tiles)
    names = []
    for source in sources:
        modality = "" if source.modality is None else f"{source.modality.name.lower()} "
        by_block = isinstance(source, Raw) and source.modality is not None and source.seams == Seams.BLOCKS
        kind = "keys" if isinstance(source, Raw) else "lines"
        names.append(modality + kind + (" by block" if by_block else ""))
    return [(number, names[number]) for number in tiles.source.tolist()]


def _row_names(row_R: Tensor, tokens: TokenMap, is_dense_S: Tensor, by_modality: bool) -> list[str]:
    """Of each row."""
    names = [f"{modality.name.lower()} rows" if by_modality else "rows" for modality in Modality]
    columns = tokens.modality[row_R].tolist(), is_dense_S[row_R].tolist()
    return ["dense " * is_dense + names[modality] for modality, is_dense in zip(*columns)]


def _runs(names: Sequence[tuple[int, str]], sizes: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """(name, total size) of neighbours of one number and name."""
    groups = groupby(zip(names, sizes), key=itemgetter(0))
    return tuple((name, sum(size for _, size in group)) for (_, name), group in groups)


def _rows_in_order(program: TileProgram) -> Tensor:
    """int64 [R]: the rows of all items, one item after another."""
    tile = program.item_rows.long()
    size = program.row_ptr.diff()[tile]
    return program.pos_q[program.rows[program.row_ptr[tile].repeat_interleave(size) + nth(size)].long()]


def _visits(program: TileProgram) -> Tensor:
    """int64 [4, V]: item, key tile, row of `bounds` (-1: a full tile), row of `live` or -1."""
    none = torch.full_like(program.full_tile, -1)
    full = program.full_ptr, program.full_count, (program.full_tile, none, none)
    partial = program.part_ptr, program.part_count, (program.part_tile, program.part_bounds, program.part_live)
    found = []
    for ptr, count, columns in (full, partial):
        item = torch.arange(program.items, device=ptr.device).repeat_interleave(ptr.diff())
        runs = torch.stack([item, *(column.long() for column in columns)]).repeat_interleave(count.long(), 1)
        runs[1] += nth(count.long())
        found.append(runs)
    return torch.cat(found, 1)


def _spread_out(program: TileProgram, visits: Tensor) -> Tensor:
    """uint8 [R, N] of State. Two entries may visit one tile: then a pair has the larger state."""
    item_V, tile_V, bounds_V, live_V = visits
    row_size, key_size = program.row_ptr.diff()[program.item_rows.long()], program.key_ptr.diff()
    row_start, rows = row_size.cumsum(0) - row_size, _rows_in_order(program)
    row_B = torch.arange(int(row_size.max()), device=rows.device)
    key_B = torch.arange(int(key_size.max()), device=rows.device)
    row_VB1 = (row_start[item_V][:, None] + row_B).clamp(max=len(rows) - 1)[:, :, None]
    key_V1B = (program.key_ptr[tile_V][:, None] + key_B).clamp(max=len(program.keys) - 1)[:, None]
    inside_VBB = (row_B < row_size[item_V][:, None])[:, :, None] & (key_B < key_size[tile_V][:, None])[:, None]

    low, high, k_low, k_high = (each[:, None, None] for each in program.bounds.long()[bounds_V.clamp(min=0)].unbind(1))
    pos_k_V1B = program.pos_k[program.keys[key_V1B].long()]
    distance_VBB = rows[row_VB1] - pos_k_V1B
    seen_VBB = (distance_VBB >= low) & (distance_VBB < high) & (pos_k_V1B >= k_low) & (pos_k_V1B < k_high)
    has_bits = (live_V >= 0).nonzero().flatten()
    bits_WB = program.live[live_V[has_bits]][:, key_B // 64] >> key_B % 64 & 1
    seen_VBB[has_bits] &= (bits_WB == 1)[:, None]
    state_VBB = torch.where(seen_VBB, State.PARTIAL, State.HIDDEN)
    state_VBB[bounds_V < 0] = State.FULL

    state_RN = torch.zeros(len(rows), len(program.keys), dtype=torch.uint8, device=rows.device)
    place_VBB = row_VB1 * len(program.keys) + key_V1B
    state_RN.view(-1).scatter_reduce_(0, place_VBB[inside_VBB], state_VBB[inside_VBB].byte(), "amax")
    return state_RN
