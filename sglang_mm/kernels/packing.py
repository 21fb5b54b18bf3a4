"""Keys and values in the order of a program's tiles: the permutation. Kernels then read dense tiles and no index.

    keys of the piece   k0 k1 k2 k3 k4 k5 k6 ..          program.keys: raw source | lines of one class | ...
    packed, align 1     k0 k1 .. k6 | k2 k5 | k1 k4 k6   a run of tiles is one range of rows, start[t] .. start[t + n]
    packed, align 128   each tile from row 128 t on, padded; positions of the padding are INF, so every bound hides it

A line is copied for all K/V heads, though few look at it: lines are short, and one index serves all heads.
K keys of the piece, N packed rows.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_mm.types import INF, TileProgram

Watch = Callable[[str], AbstractContextManager]
"""`with watch("permutation"):` counts what runs inside towards that stage."""


@dataclass(frozen=True, eq=False)
class Order:
    """index int64 [N]: of a key of the piece; pos int32 [N].

    start int64 [key tiles + 1]: where tiles begin. stop int64 [key tiles + 1]: where the tile before each one ends,
    without padding, so that tiles t .. t + n - 1 lie in rows start[t] .. stop[t + n] - 1.
    """

    index: Tensor
    pos: Tensor
    start: Tensor
    stop: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """k_NHD, v_NHD [N, Hkv, D]: contiguous copies, dtype of k and v; v_NHD is None where there was no v."""

    k_NHD: Tensor
    v_NHD: Tensor | None


def packing_order(program: TileProgram, align: int = 1) -> Order:
    """Without waiting for the device. align: 1, or 128 for kernels that address tiles by number."""
    if align == 1:
        index = program.keys.long()
        return Order(index, program.pos_k[index].int(), program.key_ptr, program.key_ptr)
    tiles = len(program.key_ptr) - 1
    place = torch.arange(align, device=program.keys.device)
    at = program.key_ptr[:-1, None] + place
    is_key = (at < program.key_ptr[1:, None]).flatten()
    if not len(program.keys):
        return Order(at.flatten(), at.flatten().int(), program.key_ptr, program.key_ptr)
    index = program.keys[at.flatten().clamp(max=len(program.keys) - 1)].long()
    pos = program.pos_k[index].int().where(is_key, INF)
    start = torch.arange(tiles + 1, device=place.device) * align
    stop = torch.cat([start[:1], start[:-1] + program.key_ptr.diff()])
    return Order(index, pos, start, stop)


def pack(k_KHD: Tensor, v_KHD: Tensor | None, order: Order) -> Packed:
    """Padding holds keys and values of other tiles: finite where those are, and hidden by its position."""
    return Packed(k_KHD.index_select(0, order.index), None if v_KHD is None else v_KHD.index_select(0, order.index))


class Packer:
    """Packs the keys and values of one piece when a backend asks, and again only for another permutation.

    k_KHD, v_KHD [K, Hkv, D]; v_KHD None for none. Keeps the last copy alone, since a copy is as large as the piece: run
    programs of one permutation one after another (`by_permutation`). watch: stage `permutation`.
    """

    def __init__(self, k_KHD: Tensor, v_KHD: Tensor | None, watch: Watch | None = None):
        self.k_KHD, self.v_KHD = k_KHD, v_KHD
        self._watch = watch or nullcontext
        self._tables: Sequence[Tensor] = ()
        self._form: object = None
        self._kept: Any = None

    def pack(self, program: TileProgram, align: int = 1) -> tuple[Order, Packed]:
        """The program's tiles in the order of `packing_order`."""

        def make() -> tuple[Order, Packed]:
            order = packing_order(program, align)
            return order, pack(self.k_KHD, self.v_KHD, order)

        return self.once(program, align, make)

    def once(self, program: TileProgram, form: object, make: Callable[[], Any]) -> Any:
        """What `make` returns, made again only where the program lists other keys, or the form is another."""
        tables = program.keys, program.key_ptr, program.pos_k
        same = form == self._form and len(self._tables) == len(tables)
        if not same or any(mine is not theirs for mine, theirs in zip(self._tables, tables)):
            self._tables, self._kept = (), None  # freed before the next is made
            with self._watch("permutation"):
                self._kept = make()
            self._tables, self._form = tables, form
        return self._kept


def by_permutation(programs: Sequence[TileProgram]) -> list[TileProgram]:
    """The same programs; those that share their lists of keys come one after another."""
    groups: dict[tuple[int, int], list[TileProgram]] = {}
    for program in programs:
        groups.setdefault((id(program.keys), id(program.key_ptr)), []).append(program)
    return [program for group in groups.values() for program in group]
