"""Tiles of 128 x 128 that a grid's lines touch where they lie, and as the lists that the compiler makes of them.

python -m benchmarks.tiles          writes docs/tiles.md; exact counts, and the compiler's processor time
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_mm.patterns.catalog import Grid
from sglang_mm.patterns.chosen import BLOCK, Panel, Phases, Selection, Unit
from sglang_mm.patterns.density import density
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows
from sglang_mm.plan.geometry import parse_geometry
from sglang_mm.types import Axis, TileProgram, TokenMap

PAGE = Path(__file__).parents[1] / "docs" / "tiles.md"
SIZES = {"64K": 2**16, "1M": 2**20}
FRAMES = {
    14: (13, 14, Axis.ROW),
    28: (16, 28, Axis.ROW),
    182: (13, 14, Axis.FRAME),
    257: (1, 257, Axis.FRAME),
    264: (12, 22, Axis.FRAME),
}
"""Stride of the lines: rows and columns of a frame, and the axis along which one class gives these lines."""
ALONE = {"sink": 0, "window": 1, "tail": False}
KINDS = {
    "Vertical lines": Grid(vertical=True, **ALONE),
    "Horizontal lines": Grid(vertical=False, horizontal=True, **ALONE),
    "The whole grid: both lines, sink 64, window 1024, dense tail": Grid(horizontal=True, sink=64, window=1024),
}
COLUMNS = ("tokens", "stride", "density", "tiles before", "tiles after", "fewer", "entries", "MB", "compile s")
TEXT = """# Tiles before and after permutation

How many tiles of 128 x 128 a kernel multiplies, for one head and one rank (`python -m benchmarks.tiles` writes this
page). Percentages are shares of the causal tiles: n (n + 1) / 2 for n blocks of 128 tokens.

- **before**: tiles of the prompt in its own order in which at least one pair of the pattern lies.
- **after**: tiles that the compiled program visits, with lines gathered into lists of keys and of rows. A tile that
  two entries need, such as sink and window, is visited twice and counted twice.
- The first two tables count the tiles of the lines alone; the third counts all tiles of the pattern.
- **density**: pairs that are seen, of the causal pairs.
- **entries**, **MB**: lists of tiles in the program, and bytes of all its tables, the 16 per token of positions among
  them. **compile s**: processor time for the first head of a request, one core, the fastest of three.

The prompt is a video and, up to the round number, text. Its frames have as many places as the stride, or rows as long
as the stride (14, 28); one class makes the lines, and there are no separators.
"""


@dataclass(frozen=True)
class Line:
    """One line of a table. before, after: tiles; seconds: of processor time."""

    size: str
    stride: int
    causal: int
    density: float
    before: int
    after: int
    entries: int
    nbytes: int
    seconds: float

    def cells(self) -> list[str]:
        tiles = [f"{count:,} ({100 * count / self.causal:.3g} %)" for count in (self.before, self.after)]
        program = [f"{self.entries:,}", f"{self.nbytes / 1e6:.3g}", f"{self.seconds:.2f}"]
        return [self.size, str(self.stride), f"{100 * self.density:.3g} %", *tiles, f"{self.fewer:.3g} x", *program]

    @property
    def fewer(self) -> float:
        return self.before / self.after


def prompt(tokens: int, stride: int) -> TokenMap:
    """A video of whole frames from the first token on, then text up to `tokens`."""
    rows, cols, _ = FRAMES[stride]
    frames, rest = divmod(tokens, rows * cols)
    return parse_geometry(f"video:{frames}x{rows}x{cols}" + (f",text:{rest}" if rest else ""))


def unit_of(grid: Grid, stride: int) -> Unit:
    """One head with lines through the first place of each frame, or the first column of each row."""
    none = torch.zeros(0, 2, dtype=torch.int64)
    return Unit((0,), (Panel(None, None, grid, Phases(FRAMES[stride][2], torch.tensor([0]), none)),))


def measure(grid: Grid, size: str, stride: int, repeat: int = 3) -> Line:
    """Exact counts, and the least time of `repeat` compilations."""
    tokens, unit = prompt(SIZES[size], stride), unit_of(grid, stride)
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        shard = Shard(tokens, torch.arange(len(tokens)))
        [program] = compile_piece(compile_rows(Selection((unit,), 1), shard), shard)
        seconds.append(time.process_time() - start)
    on_line_S = tokens.classes(FRAMES[stride][2]).of_token == 0
    blocks = -(-len(tokens) // BLOCK)
    before, after = tiles_before(grid, tokens, on_line_S), tiles_after(grid, program, on_line_S)
    counts = blocks * (blocks + 1) // 2, density(unit, tokens), before, after
    return Line(size, stride, *counts, program.entries, program.nbytes(), min(seconds))


def is_lines_alone(grid: Grid) -> bool:
    return grid.sink == 0 and grid.window == 1


def tiles_before(grid: Grid, tokens: TokenMap, on_line_S: Tensor) -> int:
    """Tiles in which a pair lies, in order of the prompt. Blocks of rows with a dense row have all causal ones."""
    block = torch.arange(-(-len(tokens) // BLOCK))
    has_line = torch.zeros_like(block, dtype=torch.bool)
    has_line[on_line_S.nonzero().flatten() // BLOCK] = True
    if is_lines_alone(grid) and grid.vertical:
        return int((len(block) - block)[has_line].sum())
    is_dense = has_line & grid.horizontal
    if grid.tail:
        is_dense |= (block + 1) * BLOCK > tokens.tail
    if is_lines_alone(grid):
        return int((block + 1)[is_dense].sum())
    has_seen_key = (has_line & grid.vertical) | (block * BLOCK < grid.sink)
    window = (block * BLOCK - grid.window + 1).clamp(min=0) // BLOCK
    before_window = torch.nn.functional.pad(has_seen_key.cumsum(0), (1, 0))[window]
    return int(torch.where(is_dense, block + 1, before_window + block - window + 1).sum())


def tiles_after(grid: Grid, program: TileProgram, on_line_S: Tensor) -> int:
    """Visits of the program; of lines alone, those into the list of keys, or of rows on lines."""
    if not is_lines_alone(grid):
        return program.visits
    raw_tiles = int(torch.searchsorted(program.key_ptr, len(program.pos_k)))
    first_row = program.rows[program.row_ptr[program.item_rows.long()]].long()
    visits = 0
    for ptr, tile, count in (
        (program.full_ptr, program.full_tile, program.full_count),
        (program.part_ptr, program.part_tile, program.part_count),
    ):
        of_dense_row = on_line_S[first_row].repeat_interleave(ptr.diff())
        visits += int(count[tile >= raw_tiles if grid.vertical else of_dense_row].sum())
    return visits


def page(tables: dict[str, Sequence[Line]]) -> str:
    """The markdown of docs/tiles.md."""
    parts = [TEXT]
    for name, lines in tables.items():
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(line.cells() for line in lines)]
        parts.append(f"## {name}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


def main() -> None:
    torch.set_num_threads(1)
    tables = {
        name: [measure(grid, size, stride) for size in SIZES for stride in FRAMES] for name, grid in KINDS.items()
    }
    PAGE.write_text(page(tables))
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
