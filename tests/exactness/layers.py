"""One layer of one prompt, spread over ranks: the sparse attention of the product, and beside it the oracle.

S tokens, Hq query heads, Hkv K/V heads, U units, D head dim.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.kernels import empty_state, merge
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.patterns.chosen import Nothing, Panel, Selection, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import Modality, TileProgram, TokenMap
from tests.exactness.decode import times_shown

DIM = 8
SCALE = 0.4
State = tuple[Tensor, Tensor]
"""out [S, Hq, D], lse [Hq, S]."""
Placed = tuple[Tensor, Tensor, TileProgram]
"""A program, and before it the positions of its rows and of its keys."""


@dataclass(frozen=True, eq=False)
class Layer:
    """rows and keys: positions of each rank's rows, and of each piece of keys, int64 each, all tokens once.

    Pieces come by as in a ring: rank r meets r, r - 1, and so on.
    """

    tokens: TokenMap
    selection: Selection
    rows: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    row_tile: int = 128
    key_tile: int = 128
    sparse_rows: bool = False

    @cached_property
    def masks(self) -> Tensor:
        """bool [U, S, S], from masks.py."""
        return torch.stack(
            [unit_mask(unit, self.tokens, sparse_rows=self.sparse_rows) for unit in self.selection.units]
        )

    @cached_property
    def programs(self) -> list[Placed]:
        """Of every rank, piece and axis."""
        count = len(self.keys)
        in_turn = [[self.keys[(rank - hop) % count] for hop in range(count)] for rank in range(len(self.rows))]
        return [each for mine, pieces in zip(self.rows, in_turn) for each in self.programs_of(mine, pieces)]

    def programs_of(self, mine: Tensor, pieces: Iterable[Tensor]) -> Iterator[Placed]:
        """The same for some rows, and some pieces that come by."""
        shard = Shard(self.tokens, mine)
        compiled = compile_rows(self.selection, shard, tile=self.row_tile, sparse_rows=self.sparse_rows)
        for piece in pieces:
            for program in compile_piece(compiled, Shard(self.tokens, piece), tile=self.key_tile):
                yield mine, piece, program

    @property
    def merges(self) -> int:
        """Partial results that a row is made of, at most."""
        return len(self.programs) // len(self.rows)

    def times_shown(self) -> Tensor:
        """uint8 [U, S, S], over all programs."""
        return times_shown_by(self.programs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> State:
        """Partial results of all programs, merged."""
        return attend_by(self.programs, q, k, v)

    def seen_by_head(self) -> Tensor:
        """bool [Hq, S, S]: the mask of the unit of each head."""
        heads = {head: number for number, unit in enumerate(self.selection.units) for head in unit.heads}
        return self.masks[[heads[head] for head in range(len(heads))]]

    def random_qkv(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of standard deviation 1.1, up to 6 or so: far from flat and far from one-hot."""
        draw = torch.Generator().manual_seed(seed)
        heads = sum(len(unit.heads) for unit in self.selection.units)
        counts = heads, heads // self.selection.group, heads // self.selection.group
        return tuple(
            torch.randn(len(self.tokens), count, DIM, generator=draw, dtype=torch.float64).to(dtype) for count in counts
        )


def one_rank(tokens: TokenMap, *units: Unit, group: int = 1, **how) -> Layer:
    everything = (torch.arange(len(tokens)),)
    return Layer(tokens, Selection(units, group), everything, everything, **how)


def single(pattern, chosen=None, heads: tuple[int, ...] = (0,), rows: Modality | None = None, keys=None) -> Unit:
    """A unit of one panel; of one that covers everything unless rows or keys say otherwise."""
    return Unit(heads, (Panel(rows, keys, pattern, Nothing() if chosen is None else chosen),))


def times_shown_by(programs: Sequence[Placed]) -> Tensor:
    """uint8 [U, S, S]: how often the programs together show a key to a row. S reaches to the last row and key."""
    prompt = 1 + max(int(position[-1]) for rows, keys, _ in programs for position in (rows, keys) if len(position))
    counts = torch.zeros(len(programs[0][2].heads), prompt, prompt, dtype=torch.uint8)
    for rows, keys, program in programs:
        counts[:, rows[:, None], keys] += times_shown(program)
    return counts


def attend_by(programs: Iterable[Placed], q: Tensor, k: Tensor, v: Tensor) -> State:
    """Partial results of the programs, merged in their order. Rows of no program keep (0, -inf)."""
    state = empty_state(q)
    for program in programs:
        add(program, state, q, k, v)
    return state


def add(placed: Placed, state: State, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Merge the partial result of a program into the state of the whole prompt."""
    rows, keys, program = placed
    (out, lse), mine = state, (state[0][rows], state[1][:, rows])
    merge(*mine, *attend_tiles(q[rows], k[keys], v[keys], program, scale=SCALE))
    out[rows], lse[:, rows] = mine
