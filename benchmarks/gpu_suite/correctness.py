"""Every backend on every case, against fp64. A backend with one red check is not timed."""

from types import ModuleType

import torch

from benchmarks.gpu_suite.cases import Case, cases
from benchmarks.gpu_suite.oracle import State, allowed, errors, exact
from benchmarks.gpu_suite.report import GREEN, RED, UNFIT, Check
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import Qkv, poison, random_qkv
from sglang_mm.errors import ConfigError
from sglang_mm.kernels import sparse_attention
from sglang_mm.kernels.problem import problem_of
from sglang_mm.kernels.selector import BACKENDS
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import TileProgram

TRUTH = "reference in fp64"
FP64 = 1e-10
"""Of fp64 against fp64, sums over a thousand keys in another order: far above their roundings, far below a mistake."""
Programs = list[list[tuple[TileProgram, ...]]]


def check_backends(suite: Suite) -> None:
    """Check all of them and note which are green: every case right, or refused in words, and one right at least.

    One after another, and the reference first: what breaks the device does so before the others, or after them.
    """
    for name in sorted(BACKENDS, key=lambda name: name != "reference"):
        if name not in suite.lost:
            with suite.trying(name):
                _check_backend(suite, name)


def _check_backend(suite: Suite, name: str) -> None:
    mine = []
    for case in cases(suite.sizes, suite.device):
        checks = check_case(case, {name: BACKENDS[name]}, suite.device, with_truth=name == "reference")
        suite.report.checks += checks
        mine += [check.status for check in checks if check.backend == name]
    counts = ", ".join(f"{mine.count(status)} {status}" for status in dict.fromkeys(mine))
    print(f"[{suite.budget.spent:5.0f} s] {name}: {counts}", flush=True)
    if RED not in mine and GREEN in mine:
        suite.green += (name,)


def check_case(
    case: Case, backends: dict[str, ModuleType], device: torch.device, with_truth: bool = True
) -> list[Check]:
    """The compiler and the reference in fp64 against masks, if asked for; then each backend."""
    qkv = random_qkv(len(case.prompt), case.heads, case.kv_heads, case.head_dim, case.dtype, device, case.seed)
    programs = _compile(case)
    unfit = {name: _unfit(module, case, programs, qkv) for name, module in backends.items()}
    checks = [Check(str(case), name, UNFIT, why=why) for name, why in unfit.items() if why]
    fit = [name for name, why in unfit.items() if not why]
    if not fit and not with_truth:
        return checks
    expected, limits = _expected(case, programs, qkv)
    if with_truth:
        doubles = tuple(each.double() for each in qkv)
        checks.append(_check(case, TRUTH, "reference", programs, doubles, expected, [FP64, FP64]))
    return checks + [_check(case, name, name, programs, qkv, expected, limits) for name in fit]


def _expected(case: Case, programs: Programs, qkv: Qkv) -> tuple[list[State], list[float]]:
    """Of each rank, and the largest errors allowed in out and log-sum-exp."""
    scale = case.head_dim**-0.5
    seen = _seen(case)
    expected, limits = [], [0.0, 0.0]
    for number, (rows, pieces) in enumerate(case.ranks):
        keys = torch.cat(pieces)
        given = qkv[0][rows], qkv[1][keys], qkv[2][keys], seen[:, rows][:, :, keys], scale
        expected.append(exact(*given))
        merges = sum(map(len, programs[number]))
        limits = [max(pair) for pair in zip(limits, allowed(*given, expected[-1], merges))]
    return expected, limits


def _compile(case: Case) -> Programs:
    """Per rank and piece."""
    found = []
    for rows, pieces in case.ranks:
        compiled = compile_rows(case.selection, Shard(case.prompt.tokens, rows))
        found.append([compile_piece(compiled, Shard(case.prompt.tokens, piece)) for piece in pieces])
    return found


def _seen(case: Case) -> torch.Tensor:
    """bool [Hq, S, S]."""
    size = len(case.prompt)
    seen_HSS = torch.zeros(case.heads, size, size, dtype=torch.bool, device=case.prompt.tokens.modality.device)
    for unit in case.selection.units:
        seen_HSS[list(unit.heads)] = unit_mask(unit, case.prompt.tokens)
    return seen_HSS


def _unfit(module: ModuleType, case: Case, programs: Programs, qkv: Qkv) -> str | None:
    for (rows, pieces), of_pieces in zip(case.ranks, programs):
        for piece, of_piece in zip(pieces, of_pieces):
            for program in of_piece:
                why = module.unfit(problem_of(qkv[0][rows], qkv[1][piece], program))
                if why:
                    return why
    return None


def _check(case: Case, backend: str, run: str, programs: Programs, qkv: Qkv, expected: list[State], limits) -> Check:
    """Largest errors over all ranks. What the backend raises is red, unless it refuses the case in words."""
    worst = (0.0, 0.0)
    try:
        for (rows, pieces), of_pieces, want in zip(case.ranks, programs, expected):
            got = attend_pieces(qkv, rows, pieces, of_pieces, run, case.head_dim**-0.5)
            worst = tuple(max(pair) for pair in zip(worst, errors(got, want)))
    except ConfigError as error:
        return Check(str(case), backend, UNFIT, why=str(error))
    except Exception as error:  # any: a backend is other people's code too, and the others are still to be checked
        return Check(str(case), backend, RED, why=f"{type(error).__name__}: {str(error)[:400]}")
    wrong = [
        f"{name} error {error:.2e} > {limit:.2e}"
        for name, error, limit in zip(("out", "lse"), worst, limits)
        if not error <= limit
    ]
    return Check(str(case), backend, RED if wrong else GREEN, worst, tuple(limits), "; ".join(wrong))


def attend_pieces(qkv: Qkv, rows, pieces, programs, backend: str, scale: float) -> State:
    """The state of some rows after all pieces."""
    q, k, v = qkv
    state = None
    poison(q.device)
    for piece, of_piece in zip(pieces, programs):
        state = sparse_attention(q[rows], k[piece], v[piece], of_piece, scale=scale, backend=backend, state=state)
    return state
