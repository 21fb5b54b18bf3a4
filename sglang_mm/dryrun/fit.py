"""Whether a prompt fits, and what would make it fit."""

from dataclasses import replace

from sglang_mm.config import Config
from sglang_mm.dryrun.gpus import GIB, RUNTIME, Gpu
from sglang_mm.dryrun.prompt import LaidOut, RankShare
from sglang_mm.errors import ConfigError
from sglang_mm.parallel.memory import (
    PREFILL_BUFFER,
    REQUESTS,
    Load,
    MemoryTable,
    ModelSizes,
    even_table,
    memory_table,
)
from sglang_mm.parallel.nodes import Nodes

WIDEST = 64
"""Replicas, up to which a remedy is looked for."""


class DoesNotFit(ConfigError):
    """The prompt needs more memory than the GPU has."""


def table_of(
    model: ModelSizes, config: Config, laid_out: LaidOut, share: RankShare, *, context: int, requests: int = REQUESTS
) -> MemoryTable:
    """What one rank holds; of the schedule that takes more, where the server would choose one."""
    pool = laid_out.pages * laid_out.page
    schedules = ("ring", "gather") if config.schedule == "auto" else (config.schedule,)
    load = Load(
        tokens=len(laid_out.tokens),
        rows=share.rows,
        largest=laid_out.largest,
        media=share.media,
        frames=share.frames,
        kept=(laid_out.pages + 1) * laid_out.page // config.keepers,
        slots=max(pool, PREFILL_BUFFER),
        context=context,
        requests=requests,
        tp=config.tp,
        ring=Nodes(config.cp, config.nodes),
    )
    tables = [memory_table(model, replace(load, schedule=schedule)) for schedule in schedules]
    return max(tables, key=lambda table: table.peak)


def require_fit(model: ModelSizes, config: Config, tables: list[MemoryTable], gpu: Gpu) -> None:
    """Raise DoesNotFit, with numbers and a way out, unless every rank's peak fits the GPU."""
    worst = max(tables, key=lambda table: table.peak)
    if worst.peak <= gpu.usable:
        return
    replica = tables.index(worst)
    biggest = sorted(worst.items, key=lambda item: item.bytes, reverse=True)[:3]
    named = ", ".join(f"{item.name} {gib(item.bytes)}" for item in biggest if item.when != "host")
    raise DoesNotFit(
        f"{worst.tokens:,} tokens with --tp {config.tp} --cp {config.cp} --kv {config.kv} take {gib(worst.peak)} on "
        f"a rank of replica {replica} ({gib(worst.held)} held, {gib(worst.prefill)} more during the prefill; {named})",
        f"{gib(gpu.usable)} of the {gib(gpu.bytes)} of one {gpu.name} ({gib(RUNTIME)} are kept for CUDA and NCCL)",
        remedy(model, config, worst.tokens, gpu),
    )


def remedy(model: ModelSizes, config: Config, tokens: int, gpu: Gpu) -> str:
    """What fits instead: sharded K/V, more replicas, a wider T, or a shorter prompt."""

    def fits(**changed) -> bool:
        return even_table(model, replace(config, **changed), tokens).peak <= gpu.usable

    ways = []
    if config.keepers == 1 and config.cp > 1 and fits(kv="sharded"):
        ways.append("--kv sharded")
    widths = [cp for cp in range(config.cp + 1, WIDEST + 1) if fits(kv="sharded", cp=cp)]
    if widths and not ways:
        ways.append(f"--kv sharded --cp {widths[0]}" if config.kv != "sharded" else f"--cp {widths[0]}")
    split = 2 * config.tp
    if model.heads % split == 0 and model.intermediate % split == 0 and fits(tp=split):
        ways.append(f"--tp {split}")
    most = longest(model, config, tokens, gpu)
    if most:
        ways.append(f"up to {most:,} tokens at this width")
    return f"pass {' or '.join(ways)}" if ways else "take GPUs with more memory, or a smaller model"


def longest(model: ModelSizes, config: Config, tokens: int, gpu: Gpu) -> int:
    """The longest video prompt below `tokens` that fits, in whole thousands; 0 if none does."""
    low, high = 0, tokens // 1000
    while low < high:
        middle = (low + high + 1) // 2
        if even_table(model, config, 1000 * middle).peak <= gpu.usable:
            low = middle
        else:
            high = middle - 1
    return 1000 * low


def static_fraction(tables: list[MemoryTable], gpu: Gpu) -> float | None:
    """A --mem-fraction-static that leaves the prefill its share and holds the rest, None where none does."""
    most = max(table.prefill for table in tables)
    largest = int(100 * (gpu.usable - most) / gpu.bytes) / 100
    return largest if max(table.held for table in tables) <= largest * gpu.bytes else None


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
