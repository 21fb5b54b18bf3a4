"""The guard's measure: how much of the probe's softmax mass a selection keeps. Exact, not a sum of estimated masses.

Masses of sink, window, columns and diagonals cannot be added up: a key in two of them would count twice. The programs
that attention will run are run on the probe's rows instead, as sparse rows also where the pattern makes them dense:

    recall of a row = sum of exp(score) over the keys seen / over all keys = exp(lse of the programs - lse of the probe)

H query heads, R probe rows, U units.
"""

from collections.abc import Sequence
from math import isfinite, nan
from statistics import fmean

import torch
from torch import Tensor

from sglang_mm.kernels import sparse_lse
from sglang_mm.patterns.chosen import Selection, Unit
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.patterns.select.held import Heads, Held
from sglang_mm.patterns.select.probe import Probe, join_lse

ROUNDINGS = 32
"""Of one log-sum-exp: each score when it is scaled, multiplied and added up (4), the exponentials added pairwise (20,
for 2^20 keys), the logarithm and its shift (2), joins of tiles, pieces and ranks (6: signs differ, so n of them count
as their square root). Each is of at most eps / 2, relative to the larger of the log-sum-exp and 1."""


def rounding(probe: Probe, heads: Heads) -> float:
    """How far the measured recall of these heads may be from the true one, the same on all ranks; NaN where scores are
    infinite or no numbers.

    recall = exp(a - b) <= 1 moves by no more than a and b do: 2 * ROUNDINGS * eps / 2 together. The number of ranks
    decides the order of additions, so that a unit that keeps all keys has a recall of 1 only up to this.
    """
    largest = [probe.largest_lse[head] for head in heads]
    return ROUNDINGS * torch.finfo(probe.lse_HR.dtype).eps * max(1.0, *largest) if all(map(isfinite, largest)) else nan


def measure_recall(held: Held, probe: Probe, units: Sequence[Unit]) -> list[float]:
    """Per unit the mean over the probe's rows and the unit's heads, the same on all ranks; 0 .. 1 up to rounding.

    units: with the panels of the probe's modality, and of heads that the probe was taken for.
    """
    lse_HR = join_lse(held, _lse_over_own_keys(held, probe, Selection(tuple(units), held.group)))
    kept_H = torch.exp(lse_HR - probe.lse_HR).double().mean(1).tolist()  # the one wait for all units
    return [fmean(kept_H[head] for head in unit.heads) for unit in units]


def _lse_over_own_keys(held: Held, probe: Probe, selection: Selection) -> Tensor:
    """[H, R]: of the keys of this rank that the selection shows; -inf for none."""
    shard = held.keys.once(("probe", probe.rows), lambda: Shard(held.tokens, probe.positions))  # the same in all layers
    rows = compile_rows(selection, shard, sparse_rows=True)
    return sparse_lse(probe.q_RHD, held.k_KGD, compile_piece(rows, held.keys), scale=held.scale)
