"""How much of causal attention a selection computes: exact counts of (query, key) pairs, without any S x S table.

Each sparse row i has three ranges of keys. The outer two it sees; of the middle one it sees columns (separators,
lines), whole blocks of 128, and keys at chosen class differences:

    0 ........ lo .......................... hi ........ i
    |  sink    |  middle: columns | blocks   |  window   |         lo = min(sink, i + 1), hi = max(lo, i + 1 - window)

Prefix sums over the keys count ranges and columns. Blocks that lie in the middle of every row of a row block count as
a product; the few that are cut by lo or hi are counted row by row. Work is O(S), plus the listed pairs of blocks, plus
S log S per class difference. Suffixes: S tokens, Z = S + 1 prefix sums, R rows, E pairs of blocks, B = 128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Lines, Phases, Unit
from sglang_mm.types import Modality, TokenMap


def density(unit: Unit, tokens: TokenMap) -> float:
    """Pairs that one head of the unit sees, over the S * (S + 1) / 2 causal ones; 0 < density <= 1."""
    seen = sum(pairs(panel.pattern, tokens, panel.chosen, panel.rows, panel.keys) for panel in unit.panels)
    return seen / (len(tokens) * (len(tokens) + 1) // 2)


def pairs(
    pattern: Pattern,
    tokens: TokenMap,
    chosen: Chosen,
    rows: Modality | None = None,
    keys: Modality | None = None,
) -> int:
    """How many entries of the pattern's mask are true, among rows and keys of the modalities (None: all).

    chosen: shifts are below the size of their name space and, like columns, diagonals and blocks, named once.
    """
    row_S, key_S = _of(rows, tokens), _of(keys, tokens)
    match pattern:
        case Dense():
            return _causal(row_S, key_S)
        case Blocks():
            return _in_blocks(*_listed(chosen), _Ranges(sink=0, window=0), row_S, key_S)
        case TriShape():
            dense_S = _last(pattern.last, tokens)
        case Grid():
            dense_S = _dense_rows(pattern, tokens, chosen)
        case _:
            dense_S = torch.zeros_like(row_S)
    sparse_S = row_S & ~dense_S
    seen = _causal(row_S & dense_S, key_S)
    ranges = _Ranges(pattern.sink, pattern.window)
    match pattern:
        case VerticalSlash():
            column_S = torch.zeros_like(key_S)
            column_S[chosen.columns.to(key_S.device)] = True
            others_S = key_S & ~column_S
            blocks = _on_diagonals(chosen, len(tokens))
            seen += _in_ranges(ranges, sparse_S, key_S, key_S & column_S)
            return seen + _in_blocks(*blocks, ranges, sparse_S, others_S)
        case Grid():
            column_S = tokens.separators | (_of_classes(tokens, chosen) & pattern.vertical)
            seen += _in_ranges(ranges, sparse_S, key_S, key_S & column_S)
            shifts = chosen.shifts if pattern.slash else chosen.shifts[:0]
            return seen + _at_shifts(shifts, tokens, chosen, ranges, sparse_S, key_S & ~column_S)
    return seen + _in_ranges(ranges, sparse_S, key_S, torch.zeros_like(key_S))


@dataclass(frozen=True)
class _Ranges:
    sink: int
    window: int

    def middle(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """lo, hi of each row."""
        lo = (row + 1).clamp(max=self.sink)
        return lo, torch.maximum(lo, row + 1 - self.window)


def _of(modality: Modality | None, tokens: TokenMap) -> Tensor:
    return torch.ones_like(tokens.modality, dtype=torch.bool) if modality is None else tokens.modality == modality


def _last(count: int, tokens: TokenMap) -> Tensor:
    """bool [S]: the last `count` rows of the prompt."""
    return torch.arange(len(tokens), device=tokens.modality.device) >= len(tokens) - count


def _of_classes(tokens: TokenMap, chosen: Phases) -> Tensor:
    """bool [S]: tokens of a chosen class."""
    classes = tokens.classes(chosen.axis)
    is_chosen = torch.zeros(len(classes) + 1, dtype=torch.bool, device=classes.of_token.device)
    is_chosen[chosen.classes.to(is_chosen.device)] = True
    return is_chosen[classes.of_token.long()]  # tokens without a class read the last entry, which is false


def _dense_rows(grid: Grid, tokens: TokenMap, chosen: Phases) -> Tensor:
    tail_S = _last(len(tokens) - tokens.tail if grid.tail else 0, tokens)
    return tail_S | _of_classes(tokens, chosen) if grid.horizontal else tail_S


def _before(chosen_S: Tensor) -> Tensor:
    """int64 [Z]: how many are chosen before each token."""
    return torch.nn.functional.pad(chosen_S.cumsum(0), (1, 0))


def _causal(row_S: Tensor, key_S: Tensor) -> int:
    return int(_before(key_S)[1:][row_S].sum())


def _in_ranges(ranges: _Ranges, row_S: Tensor, key_S: Tensor, column_S: Tensor) -> int:
    """Pairs in sink and window, and with the columns of the middle."""
    row_R = row_S.nonzero().flatten()
    key_Z, column_Z = _before(key_S), _before(column_S)
    lo_R, hi_R = ranges.middle(row_R)
    near_R = key_Z[lo_R] + key_Z[row_R + 1] - key_Z[hi_R]
    return int((near_R + column_Z[hi_R] - column_Z[lo_R]).sum())


def _listed(chosen: BlockSet) -> tuple[Tensor, Tensor]:
    """Row block and key block of each listed pair of blocks, int64 [E]."""
    return chosen.row_blocks.repeat_interleave(chosen.ptr.diff()), chosen.key_blocks


def _on_diagonals(chosen: Lines, tokens: int) -> tuple[Tensor, Tensor]:
    """Row block and key block of each pair of blocks on a chosen diagonal, int64 [E]."""
    row_block = torch.arange(-(-tokens // BLOCK), device=chosen.diagonals.device)[:, None].expand(
        -1, len(chosen.diagonals)
    )
    key_block = row_block - chosen.diagonals
    return row_block[key_block >= 0], key_block[key_block >= 0]


def _in_blocks(row_block_E: Tensor, key_block_E: Tensor, ranges: _Ranges, row_S: Tensor, key_S: Tensor) -> int:
    """Pairs in the middle whose blocks are listed."""
    device, size = row_S.device, len(row_S)
    row_block_E, key_block_E = row_block_E.to(device), key_block_E.to(device)
    row_NB = torch.nn.functional.pad(row_S, (0, -size % BLOCK)).view(-1, BLOCK)
    key_Z = _before(key_S)
    first, stop = key_block_E * BLOCK, (key_block_E * BLOCK + BLOCK).clamp(max=size)
    hi_of_first = row_block_E * BLOCK + 1 - ranges.window
    is_whole = (ranges.sink <= first) & (stop <= hi_of_first)
    whole_E = row_NB.sum(1)[row_block_E] * (key_Z[stop] - key_Z[first])

    cut = (~is_whole & (stop > ranges.sink) & (first < hi_of_first + BLOCK - 1)).nonzero()
    row_EB = row_block_E[cut] * BLOCK + torch.arange(BLOCK, device=device)
    lo_EB, hi_EB = ranges.middle(row_EB)
    lo_EB = torch.maximum(lo_EB, first[cut])
    hi_EB = torch.maximum(lo_EB, torch.minimum(hi_EB, stop[cut]))
    cut_EB = row_NB[row_block_E[cut].flatten()] * (key_Z[hi_EB] - key_Z[lo_EB])
    return int(whole_E[is_whole].sum() + cut_EB.sum())


def _at_shifts(shifts: Tensor, tokens: TokenMap, chosen: Phases, ranges: _Ranges, row_S: Tensor, key_S: Tensor) -> int:
    """Pairs in the middle at a chosen difference of classes: for each row, keys of one class of its item are counted.

    Sorted by (item, class, position), the keys of a class of an item are one stretch, and its part between lo and hi
    another. Rows are taken in the same order, so that searches that follow each other read the same memory.
    """
    classes = tokens.classes(chosen.axis)
    class_S = classes.of_token.long()
    line_S = tokens.item.long() * len(classes) + class_S
    order_S = (line_S * len(tokens) + torch.arange(len(tokens), device=line_S.device))[class_S >= 0].sort().values
    position_S = order_S % len(tokens)
    key_place = order_S[key_S[position_S]]
    row_R = position_S[row_S[position_S]]
    spaces_R = classes.spaces.to(row_R.device)[class_S[row_R]]
    seen = 0
    for space, shift in shifts.tolist():
        row = row_R[spaces_R == space]
        start, stop = classes.starts[space], classes.starts[space + 1]
        key_class = (class_S[row] - start - shift) % (stop - start) + start
        stretch = (tokens.item[row].long() * len(classes) + key_class) * len(tokens)
        lo, hi = ranges.middle(row)
        seen += int((torch.searchsorted(key_place, stretch + hi) - torch.searchsorted(key_place, stretch + lo)).sum())
    return seen
