"""What each rank holds for a prompt of a million tokens, item by item, K/V sharded next to replicated.

python -m benchmarks.memory          writes docs/memory.md; arithmetic alone, in a second
"""

from collections.abc import Iterator
from pathlib import Path

from sglang_mm.config import Config
from sglang_mm.dryrun.fit import longest
from sglang_mm.dryrun.gpus import GIB, GPUS, RUNTIME
from sglang_mm.parallel.memory import DISK, HELD, HOST, PREFILL, STAGES, MemoryTable, ModelSizes, Tower, even_table

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
TOKENS, WIDTH = 1 << 20, 8
MODEL = ModelSizes(28, 3584, 18944, 28, 4, 128, 152064, 128000, False, 2, Tower(32, 1280, 3420, 16, 1176, 2))
WAYS = {"sharded": Config(cp=WIDTH, schedule="ring"), "replicated": Config(cp=WIDTH, schedule="ring", kv="replicated")}
FURTHEST = 1 << 24
WHEN = {
    HELD: "at all times",
    PREFILL: "in a prefill",
    **{stage: f"stage {stage}" for stage in STAGES},
    HOST: "host",
    DISK: "files",
}
TEXT = f"""# Memory of a rank

Qwen2.5-VL-7B in bf16 (28 layers, 4 K/V heads of 128, hidden size 3,584), a video of {TOKENS:,} tokens,
`--tp 1 --cp {WIDTH} --schedule ring`, one prompt at a time. `python -m benchmarks.memory` writes this page from
`sglang_mm/parallel/memory.py`; `python -m sglang_mm.launch --dry-run` makes the table of your own model, prompt and
GPU.

Bytes per token are those of one rank, divided by all tokens of the prompt. What a stage needs is there while the stage
runs; stages follow one another, so the peak is what is held, what a prefill needs throughout, and the dearest stage.
"""
NOTES = """
## How sure this is

- Weights are counted from the sizes in `config.json` and equal the parameters of the model, which a test checks.
- What attention, decoder and vision tower allocate on a CPU is measured tensor by tensor
  (`tests/parallel/test_memory.py`, `tests/serving/test_peak.py`) and stays within 10% and 15% of the table, per token.
  Some terms were fitted to these very runs of a tiny model; another shape would be the independent check.
- On a GPU the same code runs with SGLang's fused kernels, which make fewer copies. Which, is read from their source;
  **it has not been measured on a GPU yet**.
- {runtime} GiB per GPU are set aside for CUDA, NCCL and workspaces. That is an assumption.
- Input log-probabilities add the logits of at most 512 rows at a time. `--vision stock` is not in the table: it encodes
  all frames on every rank.
"""


def page() -> str:
    tables = {name: even_table(MODEL, config, TOKENS) for name, config in WAYS.items()}
    notes = NOTES.format(runtime=RUNTIME // GIB)
    return "\n".join([TEXT, *item_lines(tables), "", *longest_lines()]) + "\n" + notes


def item_lines(tables: dict[str, MemoryTable]) -> Iterator[str]:
    """A line per item, then sums."""
    sharded, replicated = (tables[name] for name in WAYS)
    yield "| item | when | sharded: B per token | GiB | replicated: B per token | GiB |"
    yield "|---|---|---:|---:|---:|---:|"
    for item, other in zip(sharded.items, replicated.items, strict=True):
        yield _line(item.name, WHEN[item.when], item.bytes, other.bytes)
    for stage in STAGES:
        yield _line(f"all of stage {stage}", "", sharded.of(stage), replicated.of(stage))
    yield _line("**held**", "", sharded.held, replicated.held)
    yield _line(f"**prefill, with stage {sharded.dearest}**", "", sharded.prefill, replicated.prefill)
    yield _line("**peak**", "", sharded.peak, replicated.peak)


def longest_lines() -> Iterator[str]:
    """How long a prompt each GPU takes."""
    yield f"## Longest prompt on {WIDTH} GPUs"
    yield ""
    yield "Thousands of tokens of video that fit; the model's own context length is another matter."
    yield ""
    yield "| GPU | memory | sharded | replicated |"
    yield "|---|---:|---:|---:|"
    for name in ("a100", "h100", "h200", "b200"):
        gpu = GPUS[name]
        fits = [f"{longest(MODEL, config, FURTHEST, gpu) // 1000:,}" for config in WAYS.values()]
        yield f"| {name.upper()} | {gpu.bytes / GIB:.1f} GiB | {' | '.join(fits)} |"


def _line(name: str, when: str, *counts: int) -> str:
    cells = [cell for count in counts for cell in (f"{count / TOKENS:,.1f}", f"{count / GIB:.2f}")]
    return f"| {name} | {when} | {' | '.join(cells)} |"


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
