"""A decoding step of context parallelism in a CUDA graph: one row over this rank's part of the keys, C parts merged.

The other parts are there beforehand, as if they had arrived. Captured once, replayed, and compared with running it
eagerly, and that with the reference. Caches are warm where a part is smaller than the L2. Without a GPU it runs eagerly
alone.
"""

from collections.abc import Callable

import torch

from benchmarks.gpu_suite.ceilings import COPY
from benchmarks.gpu_suite.oracle import State
from benchmarks.gpu_suite.prompts import Prompt, video_prompt
from benchmarks.gpu_suite.selections import dense_selection
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.spot import check_rows
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import random_qkv
from benchmarks.gpu_suite.timing import Timing, measure
from sglang_mm.kernels import empty_state, merge, sparse_attention
from sglang_mm.kernels.tiles import attend_tiles
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.types import TileProgram

REPLAYS = 20
"""Steps of one timed run, so that the time of one launch is spread over many."""
DIFFERS = "differs from eager"
Step = Callable[[], State]


def time_decode(suite: Suite, point: Point) -> None:
    """Every green backend, for every number of ranks."""
    tokens = point.tokens
    if not suite.budget.allows(f"decoding at {tokens} tokens", 10.0 * len(suite.timed)):
        return
    prompt = video_prompt(tokens, suite.device, suite.sizes.frame)
    qkv = random_qkv(tokens, point.heads, point.kv_heads, suite.sizes.head_dim, suite.sizes.dtype, suite.device)
    for backend in suite.timed:
        for width in suite.sizes.widths:
            with suite.trying(backend, f"{backend}: decoding, {point.name}, C = {width}"):
                _time_step(suite, prompt, qkv, backend, width, point)


def _time_step(suite: Suite, prompt: Prompt, qkv, backend: str, width: int, point: Point) -> None:
    q, k, v = qkv[0][-1:], *qkv[1:]
    scale = q.shape[2] ** -0.5
    parts = torch.arange(len(prompt), device=q.device).tensor_split(width)
    programs = [_program(prompt, part, point) for part in parts]
    wanted = empty_state(q)
    for part, program in zip(parts, programs):
        merge(*wanted, *attend_tiles(q, k[part], v[part], program, scale=scale))
    held = [(k[part], v[part]) for part in parts]

    def attend(rank: int) -> State:
        return sparse_attention(q, *held[rank], [programs[rank]], scale=scale, backend=backend)

    others = [attend(rank) for rank in range(1, width)]

    def step() -> State:
        state = attend(0)
        for other in others:
            merge(*state, *other)
        return state

    what = f"decoding, {point.name}, C = {width}"
    check = check_rows(what, backend, q.dtype, step(), (torch.zeros(1, dtype=torch.int64, device=q.device), wanted))
    suite.report.checks.append(check)
    if check.why:
        suite.report.fail(f"{backend}: {what}", check.why)
        return
    where = {"point": point.name, "C": width, "backend": backend}
    figures: dict[str, object] = {"eager ms": 1e3 * per_step(suite, step).median}
    nbytes = sum(each.nbytes for each in held[0])
    if COPY in suite.ceilings:
        figures["K/V at copy speed ms"] = 1e3 * nbytes / suite.ceilings[COPY]
    if suite.is_rehearsal:
        suite.report.add("decode", where, None, **figures, graph="no GPU")
        return
    replay, note = captured(step, check)
    if note.startswith(DIFFERS):
        suite.report.fail(f"{backend}: graph of {what}", note)
    suite.report.add("decode", where, per_step(suite, replay) if replay else None, **figures, graph=note)


def _program(prompt: Prompt, part: torch.Tensor, point: Point) -> TileProgram:
    """Of the prompt's last row over some keys, all of them for all heads."""
    last = torch.tensor([len(prompt) - 1], device=part.device)
    rows = compile_rows(dense_selection(point.heads, point.kv_heads), Shard(prompt.tokens, last))
    [program] = compile_piece(rows, Shard(prompt.tokens, part))
    return program


def captured(step: Step, check) -> tuple[Callable[[], None] | None, str]:
    """Replay of a graph of the step, whose state equals the eager one's; or None, and why not."""
    eager = [each.clone() for each in step()]
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what runs once, compilation and workspaces, must not be captured
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state = step()
    except Exception as why:  # any: a step that waits for the device cannot be captured, and that is the finding
        torch.cuda.synchronize()
        return None, f"not captured: {type(why).__name__}: {str(why).splitlines()[0][:120]}"
    for each in state:
        each.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    differs = max(float((one - other).abs().max()) for one, other in zip(state, eager))
    if differs == 0:
        return graph.replay, "equal to eager"
    is_close = differs <= min(check.allowed)  # NaN, of what a replay does not write, is not
    return (graph.replay if is_close else None), f"{'off' if is_close else DIFFERS} by {differs:.1e}"


def per_step(suite: Suite, step: Callable[[], object]) -> Timing:
    """Seconds of one step."""

    def several():
        for _ in range(REPLAYS):
            step()

    run = measure(several, suite.device, suite.sizes.repeat_s / 4)
    return Timing(run.median / REPLAYS, run.low / REPLAYS, run.high / REPLAYS, run.n)
