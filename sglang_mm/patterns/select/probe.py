"""The probe: the last rows of a span, from whose attention to all keys a layer's sets are chosen (Algorithms 1, 2, 4).

    rows of video      . . . . . . . . . . . . . [ 64 rows ] . . .     the last of the modality's last span so far
    rows of text       . . [ 30 rows ]                                 fewer where the span is shorter
    rows of all                              [ 64 rows ]               boundary none: the last of the prompt or chunk

Two passes over this rank's keys, in kernels/probe.py, so that no rows x keys table exists: the row log-sum-exp, joined
over all ranks, and in masses.py the probabilities that follow from it.
R probe rows, K keys of a tile, H query heads, Z slots as in kernels/probe.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels.probe import row_lse
from sglang_mm.patterns.select.held import Heads, Held, make_slots
from sglang_mm.types import Modality, TokenMap

PROBE_ROWS = 64


@dataclass(frozen=True, eq=False)
class Probe:
    """rows: consecutive positions, at most 64. q_RHD [R, H, D]: their queries, all heads, dtype of q.

    lse_HR [H, R]: natural log-sum-exp of their scaled scores over all keys of all ranks; NaN for heads not asked for.
    """

    modality: Modality | None
    rows: range
    q_RHD: Tensor
    lse_HR: Tensor

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.rows.start, self.rows.stop, device=self.q_RHD.device)

    @cached_property
    def largest_lse(self) -> list[float]:
        """Of each head, in magnitude, with one wait for all: NaN where any is, and for heads not asked for."""
        return self.lse_HR.abs().amax(1).tolist()


def probe_range(tokens: TokenMap, modality: Modality | None, chunk: range) -> range:
    """Probe rows inside a chunk of the prompt; empty where the chunk has no row of the modality."""
    if modality is not None and not bool((tokens.modality[chunk.start : chunk.stop] == modality).any()):
        return range(0)
    rows = _until(tokens, chunk.stop).probe_rows(modality, PROBE_ROWS)
    return range(max(chunk.start, int(rows[0])), int(rows[-1]) + 1)


def _until(tokens: TokenMap, stop: int) -> TokenMap:
    if stop == len(tokens):
        return tokens
    columns = {each.name: getattr(tokens, each.name) for each in fields(tokens)}
    return TokenMap(
        **{name: column[:stop] if isinstance(column, Tensor) else column for name, column in columns.items()}
    )


def take_probe(held: Held, modality: Modality | None, units: Sequence[Heads]) -> Probe | None:
    """Gather the probe's queries from the ranks that hold them, and pass 1 for the heads of `units`.

    None where the chunk has no such row. Raises ConfigError when a row is held by no rank or by several.
    """
    rows = probe_range(held.tokens, modality, held.chunk)
    if not len(rows):
        return None
    q_RHD = _gather_queries(held, rows)
    heads = make_slots(units, held).heads
    lse_HR = row_lse(q_RHD, held.k_KGD, held.pos_k, rows, units, scale=held.scale)
    lse_HR[heads] = join_lse(held, lse_HR[heads])
    return Probe(modality, rows, q_RHD, lse_HR)


def join_lse(held: Held, lse: Tensor) -> Tensor:
    """Log-sum-exp over all ranks' keys of log-sum-exps over each rank's; added in order of ranks, so equal on all."""
    return torch.logsumexp(held.peers.gather(lse), dim=0)


def _gather_queries(held: Held, rows: range) -> Tensor:
    """[R, H, D]. Every rank adds its rows to zeros: exact, for one rank holds each."""
    first, last = torch.searchsorted(held.pos_q, held.pos_q.new_tensor([rows.start, rows.stop])).tolist()
    place = held.pos_q[first:last] - rows.start
    sent_RX = held.q_THD.new_zeros(len(rows), held.q_THD.shape[1] * held.q_THD.shape[2] + 1)
    sent_RX[place, :-1] = held.q_THD[first:last].flatten(1)
    sent_RX[place, -1] = 1
    found_RX = held.peers.sum(sent_RX)
    if bool((found_RX[:, -1] != 1).any()):
        given = f"probe rows {rows.start} .. {rows.stop - 1}, held by {found_RX[:, -1].int().tolist()} ranks"
        raise ConfigError(given, "one rank for each row", "pass every row of the chunk on one rank")
    return found_RX[:, :-1].reshape(len(rows), *held.q_THD.shape[1:])
