"""Sparse attention of one layer, against the best dense baseline of the same length.

    whole      index + tables + permutation + kernel: compiled and attended afresh in every run, as a layer does
    index      compile_rows + compile_piece alone
    permute    packing of keys and values alone, as Triton wants them
    ready      a call on ready programs: tables that a backend makes of a program + permutation + kernel
    kernel     what the device spends in kernels other than PyTorch's own, of one call on ready programs

What is beside the kernel, as a share of whole, is all that is not attention, idle times of the device included.

Shards are made beforehand: once per request they serve all layers. A backend that keeps plans forgets them before
every run of `whole`: layers choose for themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks.gpu_suite.dense import contenders, time_dense
from benchmarks.gpu_suite.oracle import State
from benchmarks.gpu_suite.prompts import Prompt, video_prompt
from benchmarks.gpu_suite.report import RED
from benchmarks.gpu_suite.selections import dense_selection, layer_selection, mean_density
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.spot import check_rows, sample_rows
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import Qkv, plant, poison, random_qkv
from benchmarks.gpu_suite.timing import kernel_seconds, measure, once
from benchmarks.gpu_suite.work import attention_flops, dense_pairs, visited_pairs
from sglang_mm.kernels import sparse_attention
from sglang_mm.kernels.packing import pack, packing_order
from sglang_mm.kernels.problem import problem_of
from sglang_mm.kernels.selector import BACKENDS
from sglang_mm.patterns.chosen import BLOCK, Selection
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import TileProgram

RUNS = 12
"""Of one selection and backend, with warm-ups, for estimates."""
PATIENCE = 0.25
"""Share of the time that is left which a backend's first call may take and still be timed."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What is timed: one layer's selection for one prompt, and its tensors."""

    point: Point
    share: float
    prompt: Prompt
    keys: Shard
    selection: Selection
    qkv: Qkv

    @property
    def name(self) -> str:
        return f"{self.point.name}, {100 * self.share:g} %"

    @property
    def scale(self) -> float:
        return self.qkv[0].shape[2] ** -0.5

    def index(self) -> tuple[TileProgram, ...]:
        return compile_piece(compile_rows(self.selection, self.keys), self.keys)

    def permute(self, programs: Sequence[TileProgram]) -> None:
        for program in programs:
            pack(*self.qkv[1:], packing_order(program))

    def attend(self, programs: Sequence[TileProgram], backend: str) -> State:
        return sparse_attention(*self.qkv, programs, scale=self.scale, backend=backend)


def time_sparse(suite: Suite, point: Point) -> None:
    sizes, device = suite.sizes, suite.device
    dense_s = 3 * contenders(suite, point) * suite.expected(point)
    sparse_s = RUNS * len(suite.timed) * sum(suite.expected(point, share) for share in sizes.shares)
    if not suite.budget.allows(f"sparse attention of {point.name}", 10 + dense_s + sparse_s):
        return
    prompt = video_prompt(point.tokens, device, sizes.frame)
    shard = Shard(prompt.tokens, torch.arange(point.tokens, device=device))
    for share in sizes.shares:
        selection = layer_selection(prompt, point.heads, point.kv_heads, share)
        qkv = random_qkv(point.tokens, point.heads, point.kv_heads, sizes.head_dim, sizes.dtype, device)
        plant(qkv, prompt, selection)
        if share == sizes.shares[0]:
            everything = dense_selection(point.heads, point.kv_heads)
            sample = sample_rows(qkv, prompt, everything, shard, sizes.head_dim**-0.5)
            time_dense(suite, point, qkv, sample)
        _time_layer(suite, Layer(point, share, prompt, shard, selection, qkv))
        del qkv
        suite.free()


def _time_layer(suite: Suite, layer: Layer) -> None:
    device, repeat_s = suite.device, suite.sizes.repeat_s
    programs = layer.index()
    pairs = sum(map(visited_pairs, programs))
    dense = dense_pairs(layer.point.tokens, layer.point.heads)
    index_s = measure(layer.index, device, repeat_s).median
    permute_s = measure(lambda: layer.permute(programs), device, repeat_s).median
    shared = {
        "density": mean_density(layer.selection, layer.prompt),
        "visited": pairs / dense,
        "tiles a row": pairs / (layer.point.tokens * layer.point.heads * BLOCK),
        "index ms": 1e3 * index_s,
        "permute ms": 1e3 * permute_s,
    }
    sample = sample_rows(layer.qkv, layer.prompt, layer.selection, layer.keys, layer.scale)
    for name in suite.timed:
        with suite.trying(name, f"{name} at {layer.name}"):
            _time_backend(suite, layer, programs, pairs, BACKENDS[name], sample, shared)


def _time_backend(suite: Suite, layer: Layer, programs, pairs: int, module: ModuleType, sample, shared: dict) -> None:
    """Checks some rows first. shared: figures that no backend changes."""
    device, repeat_s, name = suite.device, suite.sizes.repeat_s, module.NAME
    what = f"{name} at {layer.name}"
    why = next(filter(None, (module.unfit(problem_of(*layer.qkv[:2], program)) for program in programs)), None)
    if why:
        suite.budget.skip(what, why)
        return
    poison(device)
    check = check_rows(layer.name, name, suite.sizes.dtype, layer.attend(programs, name), sample)
    suite.report.checks.append(check)
    if check.status == RED:
        suite.report.fail(what, check.why)
        return

    def whole():
        forget_plans(name)
        layer.attend(layer.index(), name)

    first_s = once(whole, device)
    if first_s > PATIENCE * suite.budget.left:
        suite.budget.skip(what, f"one call takes {first_s:.1f} s")
        return
    whole_s = measure(whole, device, repeat_s, before=first_s)
    ready_s = measure(lambda: layer.attend(programs, name), device, repeat_s).median
    kernel_s = kernel_seconds(lambda: layer.attend(programs, name), device)
    if kernel_s is None:
        suite.report.note("kernel: nothing could be profiled; it is a call on ready programs less the permutation")
        kernel_s = max(ready_s - 1e-3 * shared["permute ms"], 1e-9)
    shares = {
        "index + permute": 1e-3 * (shared["index ms"] + shared["permute ms"]) / whole_s.median,
        "beside the kernel": max(0.0, 1 - kernel_s / whole_s.median),
    }
    rates = _rates(suite, layer.point, pairs, whole_s.median, kernel_s)
    figures = shared | {"ready ms": 1e3 * ready_s, "kernel ms": 1e3 * kernel_s} | shares | rates
    where = {"point": layer.point.name, "aim": f"{100 * layer.share:g} %", "backend": name}
    suite.report.add("sparse", where, whole_s, **figures)
    suite.note_speed(name, layer.point, whole_s.median)


def forget_plans(backend: str) -> None:
    """Of backends that keep them: layers choose for themselves."""
    getattr(BACKENDS[backend], "forget_plans", lambda: None)()


def _rates(suite: Suite, point: Point, pairs: int, whole_s: float, kernel_s: float) -> dict[str, object]:
    """The kernel's rate over the tiles it visits, beside that of dense attention; and how much faster whole is."""
    head_dim = suite.sizes.head_dim
    rate = attention_flops(pairs, head_dim) / kernel_s
    figures: dict[str, object] = {"kernel TFLOP/s": rate / 1e12}
    best = suite.best_dense(point)
    if best:
        name, dense = best
        dense_rate = attention_flops(dense_pairs(point.tokens, point.heads), head_dim) / dense.median
        figures |= {"of the dense rate": rate / dense_rate, "times dense": dense.median / whole_s}
        figures |= {"dense": name, "dense TFLOP/s": dense_rate / 1e12}
    return figures
