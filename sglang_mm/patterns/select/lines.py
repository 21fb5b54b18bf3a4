"""Columns and block diagonals of vertical_slash, the heaviest of what its sink and window do not show anyway.

N choices to make, K keys of this rank, B bins of 64 distances, E diagonals of the grid of 128 x 128 blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_mm.patterns.chosen import BLOCK, Lines
from sglang_mm.patterns.select.heaviest import heaviest, number_of, rank_key, split_rows
from sglang_mm.patterns.select.held import Held
from sglang_mm.patterns.select.masses import BIN, Masses, Want, fixed
from sglang_mm.types import INF

SHARE_OF_BINS = (1, 3, 3, 1)
"""Of pairs at a distance in the bins 2d - 2 .. 2d + 1, in eighths of a block: those on the block diagonal d, times 4.
A pair at distance 128 d + x lies on it for 128 - |x| of the 128 places that its row can have inside a block."""


def choose_lines(held: Held, masses: Masses, wants: Sequence[Want]) -> list[Lines]:
    """Per want the columns and diagonals; the same on all ranks, the choice of each reached by one collective."""
    columns, diagonals = _columns(held, masses, wants), _diagonals(held, masses, wants)
    return [Lines(*chosen) for chosen in zip(columns, diagonals)]


def candidates(held: Held, wants: Sequence[Want]) -> Tensor:
    """bool [N, K]: keys of the wanted modality after the sink."""
    modality_K = held.keys.modality()
    wanted = [-1 if want.keys is None else int(want.keys) for want in wants]
    wanted_N1 = torch.tensor(wanted, device=held.device)[:, None]
    sink_N1 = torch.tensor([want.pattern.sink for want in wants], device=held.device)[:, None]
    return ((wanted_N1 < 0) | (modality_K == wanted_N1)) & (held.pos_k >= sink_N1)


def beyond_window(held: Held, masses: Masses, wants: Sequence[Want]) -> Tensor:
    """bool [N, K]: keys that some row of the modality does not see through the window: the last row is the probe's."""
    window_N1 = torch.tensor([want.pattern.window for want in wants], device=held.device)[:, None]
    return masses.probe.rows.stop - 1 - held.pos_k >= window_N1


def _columns(held: Held, masses: Masses, wants: Sequence[Want]) -> list[Tensor]:
    """Each rank sends its heaviest, as rank keys, and all take the heaviest of these."""
    most = torch.tensor([want.pattern.vertical for want in wants], device=held.device)
    sent = min(int(most.max()), held.chunk.stop)  # there are no more keys, on all ranks together
    mass_NK = masses.columns[[want.unit for want in wants]]
    mass_NK = mass_NK.masked_fill(~(candidates(held, wants) & beyond_window(held, masses, wants)), 0)
    own_NK = rank_key(mass_NK, held.pos_k).topk(min(sent, len(held.pos_k)), dim=1).values
    own_NK = torch.nn.functional.pad(own_NK, (0, sent - own_NK.shape[1]), value=-1)
    all_NX = held.peers.gather(own_NK).transpose(0, 1).flatten(1)
    best_NX = all_NX.topk(sent, dim=1).values
    is_taken_NX = (best_NX >= 0) & (torch.arange(sent, device=held.device) < most[:, None])
    ascending_NX = torch.where(is_taken_NX, number_of(best_NX), INF).sort(dim=1).values
    counts = is_taken_NX.sum(1).tolist()
    return [columns[:count] for columns, count in zip(ascending_NX, counts)]


def _diagonals(held: Held, masses: Masses, wants: Sequence[Want]) -> list[Tensor]:
    """By the mass that block diagonals would hold if the probe's rows lay anywhere inside a block."""
    last, unit = masses.probe.rows.stop - 1, [want.unit for want in wants]
    diagonals = last // BLOCK + 1
    mass_NB = torch.zeros(len(wants), 2 * diagonals + 1, dtype=torch.int64, device=held.device)
    is_candidate_NK = candidates(held, wants)
    late, early = masses.columns - masses.early, masses.early
    lower_K = torch.div(masses.probe.rows.start - held.pos_k, BIN, rounding_mode="floor")
    for mass, bin_K in ((early, lower_K), (late, lower_K + 1)):
        mass_NK = fixed(mass[unit] * is_candidate_NK)
        mass_NB.scatter_add_(1, bin_K.clamp(min=0).expand(len(wants), -1), mass_NK)
    mass_NB = held.peers.sum(mass_NB)
    window_N1 = torch.tensor([want.pattern.window for want in wants], device=held.device)[:, None]
    in_window_NB = torch.arange(1, mass_NB.shape[1] + 1, device=held.device) * BIN <= window_N1
    padded_NB = torch.nn.functional.pad(mass_NB.masked_fill(in_window_NB, 0), (2, 1))
    mass_NE = sum(share * padded_NB[:, i : i + 2 * diagonals : 2] for i, share in enumerate(SHARE_OF_BINS))
    most = torch.tensor([-(-want.pattern.slash // BLOCK) for want in wants], device=held.device)
    return split_rows(heaviest(mass_NE, most, torch.zeros(diagonals, dtype=torch.int64, device=held.device)))
