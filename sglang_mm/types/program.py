"""The tile program: which tiles of keys each tile of rows meets. The one form in which sparse attention is executed.

For one rank's rows and one piece of keys, all heads of a layer at once. A *unit* is a head, or a group of heads that
share K/V and a selection. An *item* is a unit's tile of rows; it owns a list of entries, an entry is a run of
consecutive tiles of keys. In the table of keys, every source lists the keys it may show, ascending by position: all of
the piece (`raw`), those of one modality, or the `lines` of one unit (a compact copy is what makes lines dense).

    items      unit 0, row tile 0: full [tiles 0..3]                 partial [tile 4: bounds 2]
               unit 0, row tile 1: full [tiles 0..4] [tiles 9..11]   partial [tile 5: bounds 2] [tile 12: live 0]
    keys       | raw source: tiles 0..8 | lines of unit 0: tiles 9..12 | lines of unit 1: tiles 13.. |

Key k is seen by query q through a partial entry iff  lo <= pos_q - pos_k < hi  and  k_lo <= pos_k < k_hi  and bit
(k's place in its tile) of `live` is set, where the entry has one. A full entry shows all its keys. Entries of an item
never show the same key twice, so that one online softmax over them is exact.
"""

from dataclasses import dataclass

from torch import Tensor

INF = 2**31 - 1
"""No bound: larger than any position."""


@dataclass(frozen=True, eq=False)
class TileProgram:
    """All tensors on one device; T rows, K keys of a piece; R, E, ... are counts.

    pos_q int64 [T], pos_k int64 [K]: positions of the rank's rows and of the piece's keys.
    heads: per unit, the query heads it stands for, one K/V group; group: query heads per K/V head.

    rows int32 [R], row_ptr int64 [row tiles + 1]: tile t holds rows[row_ptr[t] : row_ptr[t + 1]], in order of position.
    keys int32 [N], key_ptr int64 [key tiles + 1]: the same for keys of the piece. Tiles hold 1 to 128.
    item_unit, item_rows int32 [items]: unit and tile of rows of each item. A row occurs once per unit at most.

    full_ptr int64 [items + 1], full_tile, full_count int32 [F]: runs of key tiles [tile, tile + count) without a mask.
    part_ptr int64 [items + 1], part_tile, part_count, part_bounds, part_live int32 [P]: runs with a mask; part_live is
    -1, or a row of `live` (count is 1 then). Counts are 1 at least, but for an item's only entry.
    bounds int32 [B, 4]: lo, hi, k_lo, k_hi, with INF for none. live int64 [L, 2]: 128 bits, the lowest first.
    """

    pos_q: Tensor
    pos_k: Tensor
    heads: tuple[tuple[int, ...], ...]
    group: int

    rows: Tensor
    row_ptr: Tensor
    keys: Tensor
    key_ptr: Tensor
    item_unit: Tensor
    item_rows: Tensor

    full_ptr: Tensor
    full_tile: Tensor
    full_count: Tensor
    part_ptr: Tensor
    part_tile: Tensor
    part_count: Tensor
    part_bounds: Tensor
    part_live: Tensor
    bounds: Tensor
    live: Tensor

    @property
    def items(self) -> int:
        return len(self.item_unit)

    @property
    def entries(self) -> int:
        return len(self.full_tile) + len(self.part_tile)

    @property
    def visits(self) -> int:
        """Pairs of a row tile and a key tile that a kernel multiplies."""
        return int(self.full_count.sum()) + int(self.part_count.sum())

    def nbytes(self) -> int:
        """Bytes of the tables."""
        tables = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(table.numel() * table.element_size() for table in tables)
