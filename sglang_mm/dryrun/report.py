"""A dry run as text, and as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from sglang_mm.dryrun.fit import DoesNotFit, gib, static_fraction
from sglang_mm.dryrun.gpus import GPUS, RUNTIME
from sglang_mm.dryrun.programs import Kind
from sglang_mm.dryrun.run import DryRun
from sglang_mm.parallel.memory import DISK, HELD, HOST, PREFILL, STAGES, Item, MemoryTable

WHEN = {
    HELD: "held at all times",
    PREFILL: "during the whole prefill",
    **{stage: f"in stage {stage}" for stage in STAGES},
    HOST: "in the host's memory",
    DISK: "in files, read by this rank",
}


def layout_lines(run: DryRun) -> list[str]:
    """Which replica does and keeps what."""
    config, laid_out = run.config, run.laid_out
    lines = [
        f"sglang_mm  dry run of {run.model_path}",
        f"  prompt     {len(laid_out.tokens):,} tokens: {run.description}",
        f"  topology   tp {config.tp} x cp {config.cp}: {config.cp} replicas of {config.tp} ranks, which are alike; "
        f"schedule {config.schedule}, K/V {config.kv if config.cp > 1 else 'on one replica'}",
        f"  pages      {laid_out.pages:,} of {laid_out.page} tokens, of which each replica keeps "
        f"{laid_out.page // config.keepers}",
        *context_lines(run),
        "",
        *table(
            ["replica", "rows", "stretches", "attended pairs", "media rows", "frame tokens", "K/V rows", "peak"],
            [
                [
                    str(share.rank), f"{share.rows:,}", f"{share.stretches:,}", f"{share.pairs:.4e}",
                    f"{share.media:,}", f"{share.frames:,}", f"{share.kept:,}", gib(weighed.peak),
                ]
                for share, weighed in zip(laid_out.shares, run.tables)
            ],
        ),
    ]  # fmt: skip
    rows, pairs = ([getattr(share, name) for share in laid_out.shares] for name in ("rows", "pairs"))
    return [*lines, f"  slowest / mean: rows {uneven(rows):.4f}, attended pairs {uneven(pairs):.4f}"]


def context_lines(run: DryRun) -> list[str]:
    if run.context <= run.model.positions:
        return []
    return [f"  context    {run.context:,} tokens: pass --context-length {run.context}, the model's own is "
            f"{run.model.positions:,}"]  # fmt: skip


def memory_lines(run: DryRun) -> list[str]:
    """The rank that takes most, item by item, and on which GPUs it fits."""
    rank = max(range(len(run.tables)), key=lambda rank: run.tables[rank].peak)
    weighed = run.tables[rank]
    lines = ["", f"  memory of a rank of replica {rank}, which takes most; at the right, bytes per token of the prompt"]
    for when in WHEN:
        own = [item for item in weighed.items if item.when == when]
        if own:
            mark = "  (the dearest)" if when == weighed.dearest else ""
            lines.append(f"    {WHEN[when]}: {gib(weighed.of(when))}{mark}")
            lines += [
                f"      {item.name:36} {gib(item.bytes):>11} {item.bytes / weighed.tokens:10,.1f}" for item in own
            ]
    lines.append(
        f"    peak {gib(weighed.peak)} = {gib(weighed.held)} held + {gib(weighed.prefill)} in the prefill, "
        f"and {gib(RUNTIME)} for CUDA and NCCL, which is assumed"
    )
    return [*lines, *fit_lines(run)]


def _line(item: Item, tokens: int) -> str:
    return f"{item.name:36} {gib(item.bytes):>11} {item.bytes / tokens:10,.1f}"


def fit_lines(run: DryRun) -> list[str]:
    peak = max(table.peak for table in run.tables)
    if run.gpu is None:
        fitting = [name for name, gpu in GPUS.items() if peak <= gpu.usable]
        others = [name for name in GPUS if name not in fitting]
        return [f"  fits       {', '.join(fitting) or 'none'}" + (f"; not {', '.join(others)}" if others else "")]
    if peak > run.gpu.usable:
        return []
    fraction = static_fraction(run.tables, run.gpu)
    advice = f"; pass --mem-fraction-static {fraction:.2f}" if fraction else ""
    return [f"  fits       {run.gpu.name}, with {gib(run.gpu.usable - peak)} to spare{advice}"]


def program_heading(run: DryRun) -> list[str]:
    serves = "decides so online" if run.config.is_sparse else "computes dense attention, --sparse being off"
    what = f"kinds of heads of {run.plan.model.name or 'the plan'}" if run.plan else "every pattern and boundary"
    return [
        "",
        f"  tile programs of one head, compiled for {run.config.cp} ranks x {run.config.cp} pieces: {what}",
        f"  (sets that a request would find online are evenly spaced; the server {serves})",
        f"    {'kind':28} {'heads':>5} {'density':>8} {'tiles':>12} {'masked':>7} {'entries':>10} "
        f"{'slowest':>7} {'seconds':>7}  tiles by rank",
    ]


def program_line(kind: Kind) -> str:
    tiles, masked = sum(rank.tiles for rank in kind.ranks), sum(rank.masked for rank in kind.ranks)
    return (
        f"    {kind.name:28} {kind.heads or '-':>5} {kind.density:8.2%} {tiles:12,} {masked / tiles:7.1%} "
        f"{sum(rank.entries for rank in kind.ranks):10,} {kind.balance:7.3f} "
        f"{sum(rank.seconds for rank in kind.ranks):7.2f}  {' '.join(f'{rank.tiles:,}' for rank in kind.ranks)}"
    )


def as_json(run: DryRun, refused: DoesNotFit | None) -> str:
    """Everything the text says, numbers unrounded."""
    laid_out, config = run.laid_out, run.config
    kinds = [] if refused else run.kinds
    made = {
        "model": run.model_path,
        "prompt": run.description,
        "tokens": len(laid_out.tokens),
        "tp": config.tp,
        "cp": config.cp,
        "kv": config.kv,
        "schedule": config.schedule,
        "context": run.context,
        "page": laid_out.page,
        "pages": laid_out.pages,
        "ranks": [
            {**asdict(share), "memory": memory_of(table)} for share, table in zip(laid_out.shares, run.tables)
        ],
        "programs": [{**asdict(kind), "balance": kind.balance} for kind in kinds],
        "gpu": run.gpu and {"name": run.gpu.name, "bytes": run.gpu.bytes, "usable": run.gpu.usable},
        "fits": run.gpu and refused is None,
        "mem_fraction_static": run.gpu and static_fraction(run.tables, run.gpu),
        "error": refused and str(refused),
        "seconds": run.seconds,
    }  # fmt: skip
    return json.dumps(made, indent=1)


def memory_of(table: MemoryTable) -> dict:
    items = [{**asdict(item), "bytes_per_token": item.bytes / table.tokens} for item in table.items]
    return {
        "peak": table.peak, "held": table.held, "prefill": table.prefill, "dearest": table.dearest, "items": items,
    }  # fmt: skip


def uneven(counts: Sequence[int]) -> float:
    return max(counts) * len(counts) / sum(counts)


def table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    for row in (headings, *rows):
        yield "    " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths))
