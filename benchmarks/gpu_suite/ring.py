"""The work of C ranks, one rank after another on one device: how even it is, and what splitting costs. No transport.

Rank r attends to piece r, r - 1 and so on, its own rows of every layer's selection, and merges. Efficiency is the time
of one rank with everything over C times the slowest of C ranks.
"""

from benchmarks.gpu_suite.prompts import Prompt, video_prompt
from benchmarks.gpu_suite.selections import dense_selection, layer_selection
from benchmarks.gpu_suite.sizes import Point
from benchmarks.gpu_suite.sparse import forget_plans
from benchmarks.gpu_suite.suite import Suite
from benchmarks.gpu_suite.tensors import Qkv, plant, random_qkv
from benchmarks.gpu_suite.timing import Timing, measure
from sglang_mm.kernels import sparse_attention
from sglang_mm.parallel.layout import make_layout
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows


def time_ring(suite: Suite, point: Point) -> None:
    """The fastest backend: dense, and the largest and the smallest density."""
    sizes, tokens, backend = suite.sizes, point.tokens, suite.fastest
    runs = 4 * len(sizes.widths) * 2  # dense and two selections, compiled and ready, warm-up and repeats
    if backend is None or not suite.budget.allows(f"ring of {point.name}", runs * suite.expected(point)):
        return
    prompt = video_prompt(tokens, suite.device, sizes.frame)
    for share in (1.0, max(sizes.shares), min(sizes.shares)):
        if share == 1.0:
            selection = dense_selection(point.heads, point.kv_heads)
        else:
            selection = layer_selection(prompt, point.heads, point.kv_heads, share)
        qkv = random_qkv(tokens, point.heads, point.kv_heads, sizes.head_dim, sizes.dtype, suite.device)
        plant(qkv, prompt, selection)
        where = {"point": point.name, "aim": f"{100 * share:g} %"}
        with suite.trying(backend, f"ring of {point.name}, {where['aim']}"):
            _time_widths(suite, prompt, selection, qkv, backend, where)
        del qkv
        suite.free()


def _time_widths(suite: Suite, prompt: Prompt, selection: Selection, qkv: Qkv, backend: str, where: dict) -> None:
    alone = None
    for width in suite.sizes.widths:
        ranks = [_time_rank(suite, prompt, selection, qkv, backend, width, rank) for rank in range(width)]
        whole, ready = ([rank[n].median for rank in ranks] for n in range(2))
        slowest = max(ranks, key=lambda rank: rank[0].median)[0]
        alone = alone or slowest.median
        suite.report.add(
            "ring",
            where | {"C": width, "backend": backend},
            slowest,
            **{
                "slowest / mean": slowest.median * width / sum(whole),
                "share of the index": 1 - sum(ready) / sum(whole),
                "ready programs, all ranks s": sum(ready),
                "efficiency": alone / (width * slowest.median),
            },
        )


def _time_rank(suite: Suite, prompt: Prompt, selection, qkv: Qkv, backend: str, width: int, rank: int) -> list[Timing]:
    """Of one rank over all pieces: compiled afresh, and with ready programs."""
    rows = [each.to(suite.device) for each in make_layout(prompt.runs, width).rows]
    mine = Shard(prompt.tokens, rows[rank])
    order = [(rank - hop) % width for hop in range(width)]
    pieces = [Shard(prompt.tokens, rows[piece]) for piece in order]
    q = qkv[0][rows[rank]]
    held = [(qkv[1][rows[piece]], qkv[2][rows[piece]]) for piece in order]

    def compiled():
        forget_plans(backend)
        of_rows = compile_rows(selection, mine)
        return [compile_piece(of_rows, piece) for piece in pieces]

    def attend(programs):
        state = None
        for (k, v), of_piece in zip(held, programs):
            state = sparse_attention(q, k, v, of_piece, scale=q.shape[2] ** -0.5, backend=backend, state=state)

    programs = compiled()
    runs = (lambda: attend(compiled())), (lambda: attend(programs))
    return [measure(run, suite.device, suite.sizes.repeat_s / 4) for run in runs]
