"""Some rows of a timed prompt, at its real length, against the reference: what small cases cannot show.

Offsets beyond 2^31, long lists, many works. R rows, Hq query heads, D head dim.
"""

import torch

from benchmarks.gpu_suite.oracle import State
from benchmarks.gpu_suite.prompts import Prompt
from benchmarks.gpu_suite.report import GREEN, RED, Check
from benchmarks.gpu_suite.tensors import Qkv
from sglang_mm.kernels import empty_state, merge
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import TileProgram

ROWS = 8
Sample = tuple[torch.Tensor, State]
"""Positions, and the state of these rows."""


def sample_rows(qkv: Qkv, prompt: Prompt, selection: Selection, keys: Shard, scale: float) -> Sample:
    """Some rows from one end of the prompt to the other, in fp32 and more. Selections of blocks cannot be sampled."""
    q, k, v = qkv
    device = q.device
    rows = torch.linspace(0, len(prompt) - 1, ROWS, dtype=torch.float64, device=device).long().unique()
    state = empty_state(q[rows])
    for program in compile_piece(compile_rows(selection, Shard(prompt.tokens, rows)), keys):
        merge(*state, *_one_by_one(q[rows], k, v, program, scale))
    return rows, state


def _one_by_one(q, k, v, program: TileProgram, scale: float) -> State:
    """In fp32: 1M keys in fp64 would be too much for some devices, and what is compared has 16 bits or fp32 sums."""
    return attend_tiles(q, k, v, program, scale=scale)


def check_rows(
    what: str, backend: str, dtype: torch.dtype, got: tuple[torch.Tensor, torch.Tensor | None], sample: Sample
) -> Check:
    """Relative errors over all elements of out, and the largest of the log-sum-exp, where there is one.

    Weights are rounded once, results up to twice (partial, merged), each by half an eps at most and independently, so
    that the relative error of a weighted sum is below sqrt(3) / sqrt(3) half eps. Four times that is allowed, and as
    much of fp32 for sums over a million keys, sqrt(2^20) roundings. The log-sum-exp is kept in fp32: 2^10 roundings of
    1, the sum, and 8 of the largest score.
    """
    rows, (out, lse) = sample
    half = torch.finfo(dtype).eps / 2
    fp32 = 2.0**-24
    allowed = 4 * half + 2**10 * fp32, 2**10 * fp32 + 8 * fp32 * float(lse.abs().max())
    relative = (got[0][rows].double() - out).norm() / out.double().norm()
    error = float(relative), 0.0 if got[1] is None else float((got[1][:, rows].double() - lse).abs().max())
    is_right = all(one <= limit for one, limit in zip(error, allowed))
    why = "" if is_right else f"errors {error} of rows {rows.tolist()}, allowed {allowed}"
    return Check(what, backend, GREEN if is_right else RED, error, allowed, why)
