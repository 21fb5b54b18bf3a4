"""Tile programs written by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_mm.types import TileProgram

Tiles = Sequence[Sequence[int]]


@dataclass
class Item:
    """full: (tile, count); part: (tile, count, (lo, hi, k_lo, k_hi), keys of the tile that are live, None for all)."""

    unit: int
    rows: int
    full: Sequence[tuple[int, int]] = ()
    part: Sequence[tuple[int, int, tuple[int, int, int, int], Sequence[int] | None]] = field(default=())


def tile_program(
    pos_q: Tensor, pos_k: Tensor, rows: Tiles, keys: Tiles, items: Sequence[Item], heads=((0,),), group: int = 1
) -> TileProgram:
    """rows, keys: the tiles, as indices of pos_q and pos_k."""
    full = [entry for item in items for entry in item.full]
    part = [entry for item in items for entry in item.part]
    live = [each for *_, each in part if each is not None]
    numbers = iter(range(len(live)))
    return TileProgram(
        pos_q=pos_q,
        pos_k=pos_k,
        heads=heads,
        group=group,
        rows=_int32(row for tile in rows for row in tile),
        row_ptr=_pointers(map(len, rows)),
        keys=_int32(key for tile in keys for key in tile),
        key_ptr=_pointers(map(len, keys)),
        item_unit=_int32(item.unit for item in items),
        item_rows=_int32(item.rows for item in items),
        full_ptr=_pointers(len(item.full) for item in items),
        full_tile=_int32(tile for tile, _ in full),
        full_count=_int32(count for _, count in full),
        part_ptr=_pointers(len(item.part) for item in items),
        part_tile=_int32(entry[0] for entry in part),
        part_count=_int32(entry[1] for entry in part),
        part_bounds=_int32(range(len(part))),
        part_live=_int32(-1 if entry[3] is None else next(numbers) for entry in part),
        bounds=_int32(limit for entry in part for limit in entry[2]).view(-1, 4),
        live=torch.tensor([_words(each) for each in live], dtype=torch.int64).view(-1, 2),
    )


def _int32(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def _pointers(sizes) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def _words(bits: Sequence[int]) -> list[int]:
    """128 bits as two signed words of 64, the lowest first."""
    number = sum(1 << bit for bit in bits)
    return [int.from_bytes(word.to_bytes(8, "little"), "little", signed=True) for word in divmod(number, 1 << 64)[::-1]]
