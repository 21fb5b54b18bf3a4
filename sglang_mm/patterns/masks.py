"""What a selection means, token by token: the truth that the compiler, the counts and the kernels are tested against.

    rows i \\ keys j   0 1 2 3 4 5 6 7          vertical_slash with sink 1, window 2, column 3:
                  5   s . . c w w              s sink, c column, w window, . unseen; j <= i always
                  6   s . . c . w w
                  7   s . . c . . w w

Memory is O(S * S): for prompts of a few thousand tokens. Nothing here is shared with the tile compiler.
Suffixes: S tokens, as rows or as keys.
"""

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BLOCK, BlockSet, Chosen, Phases, Unit, check_kind
from sglang_mm.types import Modality, TokenMap


def unit_mask(unit: Unit, tokens: TokenMap, *, sparse_rows: bool = False) -> Tensor:
    """bool [S, S]: entry (i, j) is true where query i of the unit's heads sees key j. Union over the panels."""
    seen_SS = torch.zeros(len(tokens), len(tokens), dtype=torch.bool, device=tokens.modality.device)
    for panel in unit.panels:
        in_panel_SS = _of(panel.rows, tokens)[:, None] & _of(panel.keys, tokens)[None, :]
        seen_SS |= in_panel_SS & mask(panel.pattern, tokens, panel.chosen, sparse_rows=sparse_rows)
    return seen_SS


def mask(pattern: Pattern, tokens: TokenMap, chosen: Chosen, *, sparse_rows: bool = False) -> Tensor:
    """bool [S, S], on the device of `tokens`: what `pattern` shows with the sets in `chosen`. Causal.

    sparse_rows: rows that the pattern makes dense (horizontal lines, text tail, last rows) see what others see.
    Raises ConfigError when `chosen` belongs to another pattern.
    """
    check_kind(pattern, chosen)
    i = torch.arange(len(tokens), device=tokens.modality.device)[:, None]
    j = i.T
    match pattern:
        case Dense():
            seen_SS = i >= 0
        case AShape():
            seen_SS = _sink_or_window(pattern, i, j)
        case TriShape():
            seen_SS = _sink_or_window(pattern, i, j) | _dense_rows(i >= len(tokens) - pattern.last, sparse_rows)
        case VerticalSlash():
            columns, diagonals = chosen.columns.to(i.device), chosen.diagonals.to(i.device)
            on_diagonal = torch.isin(i // BLOCK - j // BLOCK, diagonals)
            seen_SS = _sink_or_window(pattern, i, j) | torch.isin(j, columns) | on_diagonal
        case Grid():
            seen_SS = _sink_or_window(pattern, i, j) | _grid_lines(pattern, tokens, chosen, sparse_rows)
        case Blocks():
            seen_SS = _in_listed_blocks(chosen, i, j)
    return seen_SS & (j <= i)


def _of(modality: Modality | None, tokens: TokenMap) -> Tensor:
    """bool [S]: tokens of the modality; all for None."""
    return torch.ones_like(tokens.modality, dtype=torch.bool) if modality is None else tokens.modality == modality


def _sink_or_window(pattern: AShape | TriShape | VerticalSlash | Grid, i: Tensor, j: Tensor) -> Tensor:
    return (j < pattern.sink) | (i - j < pattern.window)


def _dense_rows(rows: Tensor, sparse_rows: bool) -> Tensor:
    return torch.zeros_like(rows) if sparse_rows else rows


def _grid_lines(grid: Grid, tokens: TokenMap, chosen: Phases, sparse_rows: bool) -> Tensor:
    class_S = tokens.classes(chosen.axis).of_token.long()
    chosen_S = torch.isin(class_S, chosen.classes.to(class_S.device))
    seen_SS = tokens.separators[None, :] | torch.zeros_like(chosen_S)[:, None]
    if grid.vertical:
        seen_SS = seen_SS | chosen_S[None, :]
    if grid.horizontal:
        seen_SS = seen_SS | _dense_rows(chosen_S, sparse_rows)[:, None]
    if grid.tail:
        in_tail_S = torch.arange(len(tokens), device=class_S.device) >= tokens.tail
        seen_SS = seen_SS | _dense_rows(in_tail_S, sparse_rows)[:, None]
    if grid.slash:
        seen_SS = seen_SS | _class_differences(tokens, chosen)
    return seen_SS


def _class_differences(tokens: TokenMap, chosen: Phases) -> Tensor:
    """bool [S, S]: both tokens are places of one item, and their classes differ by a chosen shift."""
    classes = tokens.classes(chosen.axis)
    class_S = classes.of_token.long()
    same_item_SS = tokens.item[:, None] == tokens.item[None, :]
    seen_SS = torch.zeros_like(same_item_SS)
    for space, shift in chosen.shifts.tolist():
        start, stop = classes.starts[space], classes.starts[space + 1]
        in_space_S = (class_S >= start) & (class_S < stop)
        differ_by_shift_SS = (class_S[:, None] - class_S[None, :]) % (stop - start) == shift
        seen_SS |= same_item_SS & in_space_S[:, None] & in_space_S[None, :] & differ_by_shift_SS
    return seen_SS


def _in_listed_blocks(chosen: BlockSet, i: Tensor, j: Tensor) -> Tensor:
    """bool [S, S]; rows of a block without a list see nothing: their list is kept where they are computed."""
    seen_SS = (i < 0) & (j < 0)
    for n, row_block in enumerate(chosen.row_blocks.tolist()):
        listed = chosen.key_blocks[chosen.ptr[n] : chosen.ptr[n + 1]].to(j.device)
        seen_SS |= (i // BLOCK == row_block) & torch.isin(j // BLOCK, listed)
    return seen_SS
