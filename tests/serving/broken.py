"""An engine whose workers can be broken from outside, to prove that the comparisons notice.

Which fault is on stands in the file named by FAULT_FILE; workers read it at every use.
"""

import os
from pathlib import Path

import torch

import sglang_mm
from sglang_mm.serving import worker

FAULT_FILE = "SGLANG_MM_TEST_FAULT_FILE"


def fault() -> str:
    return Path(os.environ[FAULT_FILE]).read_text()


def run_broken_scheduler(*args, **kwargs) -> None:
    from sglang_mm.parallel import ring
    from sglang_mm.serving import agreement, backend, embed, paged_backend

    agreement._drawn_by_all = _drawing_another_token(agreement._drawn_by_all)
    backend.paged_attention = paged_backend.paged_attention = _forgetting_keys(backend.paged_attention)
    backend.attend_pieces = _dropping_a_remote_piece(backend.attend_pieces)
    embed.encode_frames = _swapping_two_frames(embed.encode_frames)
    ring.merge = _merging_without_weights(ring.merge)
    worker.run_scheduler_process(*args, **kwargs)


class BrokenEngine(sglang_mm.Engine):
    run_scheduler_process_func = staticmethod(run_broken_scheduler)


def _dropping_a_remote_piece(attend):
    def attend_pieces(q, layout, rank, pieces, **kwargs):
        kept = (piece for piece in pieces if fault() != "remote piece dropped" or piece.source == rank)
        return attend(q, layout, rank, kept, **kwargs)

    return attend_pieces


def _swapping_two_frames(encode):
    def encode_frames(model, plan, like):
        encoded, frames = encode(model, plan, like), plan.exchange.encode[plan.rank]
        if fault() == "frame swapped" and plan.rank == 0 and len(frames) > 1:
            n = frames[0][1].length
            encoded[: 2 * n] = torch.cat([encoded[n : 2 * n], encoded[:n]])
        return encoded

    return encode_frames


def _merging_without_weights(merge):
    def mean(out, lse, out_i, lse_i):
        if fault() != "merge without weights":
            return merge(out, lse, out_i, lse_i)
        first = torch.isneginf(lse).T.unsqueeze(-1)
        out.copy_(torch.where(first, out_i, (out + out_i) / 2))
        return lse.copy_(torch.logaddexp(lse, lse_i))

    return mean


def _forgetting_keys(attend):
    """Rank 1 answers as if no key rested with it."""

    def paged_attention(q, k, v, table, **kwargs):
        out, lse = attend(q, k, v, table, **kwargs)
        if fault() == "resting keys forgotten" and table.residence.rank == 1:
            out.zero_(), lse.fill_(float("-inf"))
        return out, lse

    return paged_attention


def _drawing_another_token(exchange):
    """Rank 1 draws what rank 0 does not."""

    def drawn_by_all(token_ids, circle):
        if fault() == "another token drawn" and circle.rank == 1:
            token_ids += 1
        return exchange(token_ids, circle)

    return drawn_by_all
