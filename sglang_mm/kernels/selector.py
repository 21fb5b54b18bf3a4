"""Which backend runs a tile program, and why. One rule, one override.

A backend is a module with NAME, `unfit(problem)`, which says why it cannot, or None, and
`attend(q, k, v, program, scale, out, lse, packer)`, which merges the program's result into a state. The packer holds
the permuted copy of K and V, so that programs which list the same keys share one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sglang_mm.errors import ConfigError
from sglang_mm.kernels import cpu_tiles, fa4_backend, flashinfer_backend, tiles
from sglang_mm.kernels.merge import empty_state, state_dtype
from sglang_mm.kernels.packing import Packer, Watch, by_permutation
from sglang_mm.kernels.problem import Problem, problem_of
from sglang_mm.kernels.triton_backend import launch as by_triton
from sglang_mm.types import TileProgram

BACKENDS = {each.NAME: each for each in (fa4_backend, by_triton, flashinfer_backend, cpu_tiles, tiles)}
ORDER = {"cuda": ("fa4", "triton", "flashinfer", "reference"), "cpu": ("cpu", "reference")}
"""What `auto` tries, by kind of device; elsewhere the reference alone. fa4 and flashinfer wait for the device once per
program, to plan."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """backend: its name; passed_over: (name, why) of those that come before it in the order."""

    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {why}" for name, why in self.passed_over)])


def choose_backend(problem: Problem, backend: str = "auto") -> Choice:
    """Raises ConfigError for a backend that does not exist, or was asked for and cannot run."""
    _check_name(backend)
    if backend != "auto":
        why = BACKENDS[backend].unfit(problem)
        if why:
            raise ConfigError(f"backend {backend!r}: {why}", "one that can run here", "pass backend='auto'")
        return Choice(backend)
    passed_over = []
    for name in ORDER.get(problem.device.type, ()):
        why = BACKENDS[name].unfit(problem) or _not_worth_it(name, problem)
        if why is None:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, why))
    return Choice("reference", tuple(passed_over))


def _not_worth_it(name: str, problem: Problem) -> str | None:
    """fa4 runs full entries alone, and gathers and merges rows for that. By its nature, not yet by its times."""
    if name == "fa4" and problem.full_entries < problem.items:
        return "the program has fewer full entries than items"
    return None


def sparse_attention(
    q_THD: Tensor,
    k_KHD: Tensor,
    v_KHD: Tensor,
    programs: Sequence[TileProgram],
    *,
    scale: float,
    backend: str = "auto",
    state: tuple[Tensor, Tensor] | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a rank's rows over one piece of keys: the programs of the piece, their results merged.

    q_THD [T, Hq, D], k_KHD and v_KHD [K, Hkv, D], one dtype and device; scale > 0.
    state: (out [T, Hq, D], lse [Hq, T]) of other pieces, fp32 (fp64 for fp64 inputs), contiguous, changed in place.
    Returns the state with this piece in it; lse is the natural log-sum-exp of the scaled scores. A row that has seen no
    key is (0, -inf). backend: a name of BACKENDS, or `auto`; what runs is logged once. watch: stage `permutation`, the
    copies of K and V in the order of tiles, one for programs that share `keys` and `key_ptr`; the rest is the caller's.
    Raises ConfigError for what does not fit together.
    """
    out, lse = empty_state(q_THD) if state is None else state
    _check_name(backend)
    _check_scale(scale)
    _check_state(out, lse, q_THD)
    packer = Packer(k_KHD, v_KHD, watch)
    for program in by_permutation(programs):
        tiles.validate(q_THD, k_KHD, v_KHD, program)
        problem = problem_of(q_THD, k_KHD, program)
        choice = choose_backend(problem, backend)
        _say(str(choice), problem.name)
        with torch.cuda.device_of(q_THD):  # kernels are launched on the current device
            BACKENDS[choice.backend].attend(q_THD, k_KHD, v_KHD, program, scale, out, lse, packer)
    return out, lse


def sparse_lse(q_THD: Tensor, k_KHD: Tensor, programs: Sequence[TileProgram], *, scale: float) -> Tensor:
    """The log-sum-exp [Hq, T] alone, without values: Triton's kernel where it can run, else the reference.

    Raises ConfigError as `sparse_attention`.
    """
    _check_scale(scale)
    lse = q_THD.new_full((q_THD.shape[1], len(q_THD)), float("-inf"), dtype=state_dtype(q_THD.dtype))
    for program in programs:
        tiles.validate(q_THD, k_KHD, None, program)
        if by_triton.unfit(problem_of(q_THD, k_KHD, program)) is None:
            with torch.cuda.device_of(q_THD):
                by_triton.add_lse(q_THD, k_KHD, program, scale, lse)
        else:
            torch.logaddexp(lse, tiles.tile_lse(q_THD, k_KHD, program, scale=scale), out=lse)
    return lse


@cache
def _say(choice: str, device: str) -> None:
    log.info("tile programs on %s: %s", device, choice)


def _check_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r}", f"auto, {', '.join(BACKENDS)}", "pass backend='auto'")


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ConfigError(f"scale {scale}", "a number above 0", "1 / sqrt(head dim) is what models are trained with")


def _check_state(out: Tensor, lse: Tensor, q_THD: Tensor) -> None:
    dtype = state_dtype(q_THD.dtype)
    wanted = (tuple(q_THD.shape), (q_THD.shape[1], len(q_THD)))
    given = (tuple(out.shape), tuple(lse.shape))
    if given != wanted or out.dtype != dtype or lse.dtype != dtype or not (out.is_contiguous() and lse.is_contiguous()):
        given = f"a state of {out.dtype} {given[0]} and {lse.dtype} {given[1]}"
        raise ConfigError(given, f"{dtype}, contiguous, {wanted[0]} and {wanted[1]}", "begin with empty_state(q)")
