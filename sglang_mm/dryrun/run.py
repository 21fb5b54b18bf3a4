"""One dry run, from the command line's words to what is printed. Imports no sglang."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sglang_mm.config import Config
from sglang_mm.dryrun import checkpoint, fit, programs, prompt
from sglang_mm.dryrun.gpus import Gpu, parse_gpu
from sglang_mm.errors import ConfigError
from sglang_mm.parallel.memory import MemoryTable, ModelSizes
from sglang_mm.patterns.plan import Model, Plan
from sglang_mm.patterns.plan_file import load as load_plan

ANSWER = 1024
"""Tokens of context beyond the prompt, where --context-length is not given."""


@dataclass(frozen=True)
class Asked:
    """tokens, prompt: length or geometry. gpu: a name or gigabytes; None fits all. plan: a plan file; None: that of
    --sparse, or else every kind of the catalogue. sglang: the flags that are SGLang's; those that change sizes are
    read."""

    config: Config
    sglang: list[str]
    tokens: int | None = None
    prompt: str | None = None
    gpu: str | None = None
    plan: str | None = None


@dataclass(frozen=True, eq=False)
class DryRun:
    """Layout and memory; the programs are compiled when they are first asked for."""

    config: Config
    model_path: str
    model: ModelSizes
    description: str
    laid_out: prompt.LaidOut
    context: int
    tables: list[MemoryTable]
    gpu: Gpu | None
    plan: Plan | None
    began: float

    def compiled(self) -> Iterator[programs.Kind]:
        """Kind after kind, as it is ready."""
        wanted = programs.of_plan(self.plan) if self.plan else programs.of_catalogue()
        group = self.model.heads // self.model.kv_heads
        yield from programs.compile_kinds(wanted, self.laid_out.tokens, self.laid_out.layout, group)

    @cached_property
    def kinds(self) -> list[programs.Kind]:
        return list(self.compiled())

    def require_fit(self) -> None:
        """Raises DoesNotFit if a GPU was named and a rank needs more."""
        if self.gpu:
            fit.require_fit(self.model, self.config, self.tables, self.gpu)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def prepare(asked: Asked) -> DryRun:
    """Read the config, lay out, weigh. Raises ConfigError for whatever cannot be."""
    began = time.perf_counter()
    flags = _sglangs(asked.sglang)
    gpu = parse_gpu(asked.gpu) if asked.gpu else None
    raw = checkpoint.read_config(flags.model_path)
    model = checkpoint.sizes_of(raw, flags.dtype)
    checkpoint.check_width(model, asked.config.tp)
    path = asked.plan or (asked.config.sparse if asked.config.sparse not in ("off", "auto") else None)
    plan = load_plan(path) if path else None
    if plan:
        plan.require(Model.of_config(raw, flags.model_path))
    description, tokens = prompt.prompt_of(asked.tokens, asked.prompt)
    laid_out = prompt.lay_out(tokens, asked.config, flags.page_size)
    context = flags.context_length or max(model.positions, len(tokens) + ANSWER)
    if len(tokens) >= context:
        given = f"--context-length {context} for a prompt of {len(tokens)} tokens"
        raise ConfigError(given, f"{len(tokens) + 1} or more", f"pass --context-length {len(tokens) + ANSWER}")
    slots = {"context": context, "requests": flags.max_running_requests}
    tables = [fit.table_of(model, asked.config, laid_out, share, **slots) for share in laid_out.shares]
    return DryRun(
        asked.config, flags.model_path, model, description, laid_out, context, tables, gpu, plan, began
    )  # fmt: skip


def _sglangs(words: list[str]) -> argparse.Namespace:
    """What a dry run reads of SGLang's flags; the others change nothing here."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--max-running-requests", type=int, default=fit.REQUESTS)
    flags, _ = parser.parse_known_args(words)
    if not flags.model_path:
        raise ConfigError("--dry-run without --model-path", "a directory with a config.json", "pass --model-path DIR")
    return flags
