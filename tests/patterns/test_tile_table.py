"""The table of tiles: against closed forms, brute force and the page that stands in the documents."""

import re

import numpy as np
import pytest
import torch

from benchmarks import tiles
from benchmarks.tiles import FRAMES, KINDS, PAGE, SIZES, measure, prompt, tiles_after, tiles_before, unit_of
from sglang_mm.patterns.catalog import Grid
from sglang_mm.patterns.chosen import Selection
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.pictures.permuted import tiles_touched
from sglang_mm.patterns.program import Shard, compile_piece, compile_rows

pytestmark = pytest.mark.usefixtures("one_thread")
VERTICAL, HORIZONTAL, _ = KINDS.values()
B = 128


def lines_of(tokens: int, stride: int) -> np.ndarray:
    """Positions on lines: the first of every stride, as far as whole frames reach."""
    rows, cols, _ = FRAMES[stride]
    return np.arange(0, tokens // (rows * cols) * (rows * cols), stride)


def vertical_lines(tokens: int, stride: int) -> tuple[int, int]:
    """(before, after). A block of rows reaches all columns before its last row but one; the last is the row itself."""
    columns, blocks = lines_of(tokens, stride), -(-tokens // B)
    ends = np.minimum((np.arange(blocks) + 1) * B, tokens)
    seen = np.searchsorted(columns, ends - 1)
    return int((blocks - np.unique(columns // B)).sum()), int((-(-seen // B)).sum())


def horizontal_lines(tokens: int, stride: int) -> tuple[int, int]:
    """(before, after). 128 rows side by side reach as far as the last of them."""
    rows = lines_of(tokens, stride)
    last = np.append(rows[B - 1 :: B], rows[-1:] if len(rows) % B else [])
    return int((np.unique(rows // B) + 1).sum()), int((last // B + 1).sum())


def counts(grid: Grid, tokens, stride: int) -> tuple[int, int]:
    on_line_S = tokens.classes(FRAMES[stride][2]).of_token == 0
    shard = Shard(tokens, torch.arange(len(tokens)))
    [program] = compile_piece(compile_rows(Selection((unit_of(grid, stride),), 1), shard), shard)
    return tiles_before(grid, tokens, on_line_S), tiles_after(grid, program, on_line_S)


@pytest.mark.parametrize("stride", FRAMES)
@pytest.mark.parametrize("length", [600, 2048, 20_011])
def test_lines_have_closed_forms(length, stride):
    tokens = prompt(length, stride)
    assert len(tokens) == length
    assert counts(VERTICAL, tokens, stride) == vertical_lines(length, stride)
    assert counts(HORIZONTAL, tokens, stride) == horizontal_lines(length, stride)


@pytest.mark.parametrize(
    ("stride", "before", "after"), [(14, "100", "7.3"), (28, "100", "3.8"), (182, "70.5", "0.75"), (257, "50", "0.58")]
)
def test_64k_is_what_arithmetic_says(stride, before, after):
    """Shares that follow from the stride alone, worked out elsewhere for columns 0, stride, 2 stride, ..."""
    line = measure(VERTICAL, "64K", stride, repeat=1)
    assert f"{100 * line.before / line.causal:.3g}" == before
    assert f"{100 * line.after / line.causal:.2g}" == after
    assert (line.before, line.after) == vertical_lines(2**16, stride)
    assert line.fewer == line.before / line.after and 0 < line.seconds < 60


@pytest.mark.parametrize("stride", FRAMES)
@pytest.mark.parametrize(("sink", "window"), [(0, 2), (64, 300), (129, 128)])
def test_the_whole_grid_touches_what_its_mask_touches(stride, sink, window):
    tokens = prompt(1100, stride)
    for how in ({}, {"horizontal": True}, {"horizontal": True, "vertical": False, "tail": False}):
        grid = Grid(sink=sink, window=window, **how)
        touched = tiles_touched(unit_mask(unit_of(grid, stride), tokens), B)
        assert counts(grid, tokens, stride)[0] == touched
    alone = unit_mask(unit_of(VERTICAL, stride), tokens)
    alone &= (tokens.classes(FRAMES[stride][2]).of_token == 0)[None, :]
    assert counts(VERTICAL, tokens, stride)[0] == tiles_touched(alone, B)


def test_the_whole_grid_after_permutation():
    """Stride 182, 182 x 20 tokens and no text, sink 64, window 200: by hand, block by block."""
    tokens, grid = prompt(3640, 182), Grid(horizontal=True, sink=64, window=200)
    sparse = [row for row in range(3640) if row % 182]
    visits = 0
    for start in range(0, len(sparse), B):
        first, last = sparse[start], sparse[min(start + B, len(sparse)) - 1]
        visits += 1  # the sink
        visits += last // B - max(64, first - 199) // B + 1  # the band, from the sink on
        visits += last - 200 >= 182  # 19 columns from 182 on make one tile
    visits += 3458 // B + 1  # 20 dense rows make one tile, which reaches up to the last of them
    assert counts(grid, tokens, 182)[1] == visits


def test_strides_are_distances_of_lines():
    for stride, (_, _, axis) in FRAMES.items():
        tokens = prompt(3000, stride)
        on_line = (tokens.classes(axis).of_token == 0).nonzero().flatten()
        assert on_line.tolist() == lines_of(3000, stride).tolist()


def test_the_page_says_what_is_so():
    """All counts of lines against closed forms, everything of the prompts of 64K against a new measurement."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections] == list(KINDS)
    for section, grid in zip(sections, KINDS.values()):
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\| \d", line)]
        assert [(row[0], int(row[1])) for row in rows] == [(size, stride) for size in SIZES for stride in FRAMES]
        for row in rows:
            size, stride = row[0], int(row[1])
            shown = tuple(int(cell.partition(" ")[0].replace(",", "")) for cell in row[3:5])
            if grid is VERTICAL:
                assert shown == vertical_lines(SIZES[size], stride)
            if grid is HORIZONTAL:
                assert shown == horizontal_lines(SIZES[size], stride)
            if size == "64K":
                assert row[:-1] == measure(grid, size, stride, repeat=1).cells()[:-1]


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiles, "PAGE", tmp_path / "tiles.md")
    monkeypatch.setattr(tiles, "SIZES", {"64K": 2**16})
    tiles.main()
    assert capsys.readouterr().out == f"{tmp_path / 'tiles.md'} written\n"
    written, shown = (re.sub(r"[\d.]+ \|$", "", page, flags=re.MULTILINE) for page in (
        (tmp_path / "tiles.md").read_text(), PAGE.read_text(),
    ))  # fmt: skip
    assert written == "".join(line for line in shown.splitlines(True) if not line.startswith("| 1M"))
