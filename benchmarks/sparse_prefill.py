"""Dense against sparse attention of one layer's prefill, in alternating pairs, on the CPU of this machine.

    python -m benchmarks.sparse_prefill --tokens 32768 --pairs 5 --out benchmarks/results

dense: PyTorch's scaled_dot_product_attention, causal. sparse: all that the served path does for the layer: the online
selection without a plan (index), tile programs (compile), K and V in their order (permutation), attention. Both get the
same rows; nothing is kept from one run to the next. Heads are made, not learnt: see `draw`. CPU only: no number here
says anything about a GPU.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from sglang_mm.kernels import causal_attention, sparse_attention
from sglang_mm.parallel.stopwatch import Stopwatch
from sglang_mm.patterns.density import causal_pairs
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.patterns.select import Report, auto_select
from sglang_mm.patterns.select.auto import DENSE_LAYERS
from sglang_mm.patterns.select.draft import THETA
from sglang_mm.plan.geometry import parse_geometry
from sglang_mm.types import Axis, TokenMap

KINDS = ("frame line", "row line", "columns", "local")
HEADS, KV_HEADS, DIM = 8, 2, 128
LOGIT = 12.0
"""By how much the scaled score of what a head looks for is above the others."""
MARKED = 64
"""Of so many tokens one is a marked column."""
TEXT, SIDE = 64, 16
"""Tokens of text before the video, at least as many after it; a frame is SIDE x SIDE tokens."""
STAGES = ("index", "compile", "permutation", "attention")
NOISE_PAIRS = 2
BUSY = 0.5
"""Processes of others that want a core, on average over a minute."""
Qkv = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    asked = _arguments()
    told = measure(asked.tokens, asked.pairs)
    text = page(told)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "sparse-prefill.md").write_text(text)
        (asked.out / "sparse-prefill.json").write_text(json.dumps(told, indent=1) + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="of a dense and a sparse run (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a folder for sparse-prefill.md and sparse-prefill.json")
    return parser.parse_args()


def describe(tokens: int) -> str:
    """A text, a video and a question of so many tokens together, for `parse_geometry`."""
    frames = (tokens - 2 * TEXT) // SIDE**2
    if frames < 1:
        raise SystemExit(f"--tokens {tokens}: pass {2 * TEXT + SIDE**2} or more, for one frame between two texts")
    return f"text:{TEXT},video:{frames}x{SIDE}x{SIDE},text:{tokens - TEXT - frames * SIDE**2}"


def draw(tokens: TokenMap, structured: bool, seed: int = 0) -> Qkv:
    """q [S, HEADS, DIM], k and v [S, KV_HEADS, DIM], fp32: heads of each of KINDS, or noise alone.

    Each frame class, column class, block of 128 tokens, and being marked has a random direction. A key is the sum of
    its directions, a query that of what its head looks for; noise is on top of both.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(tokens)
    q, k, v = (torch.randn(size, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    if not structured:
        return q, k, v
    frame, row = (tokens.classes(axis).of_token.long() for axis in (Axis.FRAME, Axis.ROW))
    block = torch.arange(size) // 128
    numbers = frame, row, block
    directions = [normalize(torch.randn(int(n.max()) + 1, DIM, generator=generator), dim=1) for n in numbers]
    mark = normalize(torch.randn(DIM, generator=generator), dim=0)
    key = sum(table[n.clamp(min=0)] * (n >= 0)[:, None] for n, table in zip(numbers, directions))
    key[torch.randperm(size, generator=generator)[: size // MARKED]] += mark
    k.mul_(0.02).add_(key[:, None])
    for head in range(HEADS):
        frame_line, row_line = (table[(37 * head + 5) % len(table)] for table in directions[:2])
        wanted = (frame_line, row_line, mark, directions[2][block])[head % len(KINDS)]
        q[:, head] += LOGIT * DIM**0.5 * wanted
    return q, k, v


def dense(qkv: Qkv) -> Tensor:
    """[S, HEADS, DIM]."""
    by_head = [each.transpose(0, 1)[None] for each in qkv]
    out = scaled_dot_product_attention(*by_head, is_causal=True, scale=DIM**-0.5, enable_gqa=True)
    return out[0].transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Sparse:
    out: Tensor
    seconds: dict[str, float]
    report: Report
    tokens: TokenMap


def sparse(qkv: Qkv, description: str) -> Sparse:
    """As a rank alone serves the layer: where no head is sparse, by the dense kernel of `--sparse off`.

    The token map is new each time: what is kept per prompt is made again.
    """
    tokens, watch = parse_geometry(description), Stopwatch("cpu")
    shard = Shard(tokens, torch.arange(len(tokens)))
    units = [(head,) for head in range(HEADS)]
    with watch("index"):
        selection, report = auto_select(units, DENSE_LAYERS, *qkv[:2], shard, shard, scale=DIM**-0.5)
    if selection.is_dense:
        with watch("attention"):
            out, _ = causal_attention(*qkv, shard.positions, shard.positions, scale=DIM**-0.5)
        return Sparse(out, watch.seconds(), report, tokens)
    with watch("compile"):
        programs = compile_piece(compile_rows(selection, shard), shard)
    with watch("attention"):
        out, _ = sparse_attention(*qkv, programs, scale=DIM**-0.5, watch=watch)
    return Sparse(out, watch.seconds(), report, tokens)


def measure(tokens: int, pairs: int) -> dict:
    """All that is written: facts, and for structured and unstructured heads what `compare` says."""
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    description = describe(tokens)
    warm = describe(min(tokens, 1024))
    for structured in (True, False):
        small = draw(parse_geometry(warm), structured)
        dense(small), sparse(small, warm)
    return {
        "tokens": tokens,
        "prompt": description,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": DIM,
        "dtype": "float32",
        "theta": THETA,
        "device": "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "load_before": load,
        "shared": load > BUSY,
        "structured": compare(description, pairs, structured=True),
        "unstructured": compare(description, min(pairs, NOISE_PAIRS), structured=False),
    }


def compare(description: str, pairs: int, structured: bool) -> dict:
    """Dense, sparse, dense, sparse, .. on the same rows."""
    qkv = draw(parse_geometry(description), structured)
    runs: dict[str, list[float]] = {"dense": [], "sparse": [], **{stage: [] for stage in STAGES}}
    for _ in range(pairs):
        seconds, exact = _timed(lambda: dense(qkv))
        runs["dense"].append(seconds)
        seconds, found = _timed(lambda: sparse(qkv, description))
        runs["sparse"].append(seconds)
        for stage in STAGES:
            runs[stage].append(found.seconds.get(stage, 0.0))
    causal = causal_pairs(found.tokens)
    heads = [
        {
            "head": head,
            "kind": KINDS[head % len(KINDS)] if structured else "noise",
            "attended_pairs": round(share * causal),
            "rows": [str(verdict) for verdict in found.report.verdicts if verdict.heads == (head,)],
            "sparse": any(each.is_sparse for each in found.report.verdicts if each.heads == (head,)),
            "recall": min(each.recall for each in found.report.verdicts if each.heads == (head,)),
        }
        for head, share in enumerate(found.report.densities)
    ]
    return {
        "pairs": pairs,
        "seconds": {name: spread(each) for name, each in runs.items()},
        "dense_over_sparse": spread([one / other for one, other in zip(runs["dense"], runs["sparse"])]),
        "attended_pairs": sum(head["attended_pairs"] for head in heads),
        "causal_pairs": HEADS * causal,
        "fallbacks": dict(found.report.fallbacks),
        "relative_error": float((found.out - exact).norm() / exact.norm()),
        "by_head": heads,
    }


def _timed(run: Callable) -> tuple[float, object]:
    began = time.perf_counter()
    made = run()
    return time.perf_counter() - began, made


def spread(values: Sequence[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def page(told: dict) -> str:
    shared = "Others used the cores at the same time" if told["shared"] else "Nothing else ran"
    lines = [
        "# Sparse prefill, one layer, on a CPU",
        "",
        f"`python -m benchmarks.sparse_prefill --tokens {told['tokens']} --pairs {told['structured']['pairs']}`: "
        f"{told['tokens']:,} tokens (`{told['prompt']}`), {told['heads']} query and {told['kv_heads']} K/V heads of "
        f"{told['head_dim']}, {told['dtype']}. {told['cpu']}, {told['cores']} cores, {told['threads']} threads, torch "
        f"{told['torch']}. {shared} (load {told['load_before']:.1f} before). Made heads; no GPU.",
        "",
        "| median (min .. max) | structured heads | noise |",
        "|---|---:|---:|",
    ]
    both = told["structured"], told["unstructured"]
    rows = {
        "pairs of runs": [str(each["pairs"]) for each in both],
        "dense, seconds": [_span(each["seconds"]["dense"]) for each in both],
        "sparse, seconds": [_span(each["seconds"]["sparse"]) for each in both],
        **{f"of it {stage}": [_span(each["seconds"][stage], 3) for each in both] for stage in STAGES},
        "dense / sparse": [_span(each["dense_over_sparse"]) for each in both],
        "attended pairs": [f"{each['attended_pairs']:,}" for each in both],
        "causal pairs": [f"{each['causal_pairs']:,}" for each in both],
        "attended / causal": [f"{each['attended_pairs'] / each['causal_pairs']:.4f}" for each in both],
        "lowest recall of a head": [f"{min(head['recall'] for head in each['by_head']):.4f}" for each in both],
        "heads with sparse rows": [str(sum(head["sparse"] for head in each["by_head"])) for each in both],
        "output error, relative to dense": [f"{each['relative_error']:.1e}" for each in both],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += [
        "",
        f"Recall is measured on the probes; below {told['theta']:g} the guard takes another pattern, or dense.",
        "",
    ]
    lines += ["| head | looks for | attended / causal | what the guard measured |", "|---|---|---:|---|"]
    for head in told["structured"]["by_head"]:
        share = head["attended_pairs"] * told["heads"] / told["structured"]["causal_pairs"]
        verdicts = "; ".join(each.partition(" (tried")[0].partition(", ")[2] for each in head["rows"])
        lines.append(f"| {head['head']} | {head['kind']} | {share:.4f} | {verdicts} |")
    reasons = ", ".join(f"{count} x {why}" for why, count in told["unstructured"]["fallbacks"].items())
    lines += ["", f"Noise: {reasons or 'nothing fell back'}.", ""]
    return "\n".join(lines)


def _span(found: dict, digits: int = 2) -> str:
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} .. {found['max']:.{digits}f})"


if __name__ == "__main__":
    main()
