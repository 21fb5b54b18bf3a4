"""PNGs read back: sizes, colours at known pixels, pooling, refusals; and parts of small masks by hand."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from benchmarks import pictures as examples
from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.patterns.masks import unit_mask
from sglang_mm.patterns.pictures import draw_plan, draw_unit, illustrate
from sglang_mm.patterns.pictures.canvas import BACKGROUND, COLORS, HIDDEN, MODALITIES, SEPARATOR, Scale, scale_of
from sglang_mm.patterns.pictures.draw import AXIS, FOOT, LONGEST, TOP, default_tile
from sglang_mm.patterns.pictures.parts import Part, part_of_pairs
from sglang_mm.patterns.pictures.permuted import permuted, tiles_touched
from sglang_mm.patterns.pictures.views import APART, BANDS, FRAMES, LINE, MaskView
from sglang_mm.patterns.plan import GroupPlan, LayerPlan, Model, Plan, one_of_each
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES_OF_3 = token_map(Text(1), Media(frames=2, rows=1, cols=3), Text(1))
SEPARATED = token_map(Text(1), Media(frames=2, rows=1, cols=2, newline=True))
VIDEO = token_map(Text(20), Media(8, 4, 6, newline=True), Text(40))
MIXED = token_map(Text(30), Media(1, 6, 8), Text(20), Media(6, 4, 6), Text(16))
MODEL = Model("A", layers=2, heads=8, kv_heads=2, head_dim=32, name="tiny")
LETTERS = dict(zip(Part, ".bwsd/|:"))


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def phases(*classes: int, shifts=()) -> Phases:
    return Phases(Axis.FRAME, long(*classes), torch.tensor(shifts, dtype=torch.int64).view(-1, 2))


def whole(pattern, chosen) -> Unit:
    return Unit((0,), (Panel(None, None, pattern, chosen),))


def hexes(pixels: np.ndarray) -> np.ndarray:
    """`#rrggbb` of each pixel of an image as read, floats [h, w, 4]."""
    values = (pixels[..., :3] * 255).round().astype(int)
    return np.vectorize(lambda r, g, b: f"#{r:02x}{g:02x}{b:02x}")(*np.moveaxis(values, -1, 0))


def dark(color: str) -> str:
    """What a full tile shows: 0.68 of each channel."""
    return "#" + bytes(int(int(color[i : i + 2], 16) * 0.68) for i in (1, 3, 5)).hex()


@pytest.mark.parametrize(
    ("tokens", "pattern", "chosen", "expected"),
    [
        (FRAMES_OF_3, Dense(), Nothing(), "d dd ddd dddd ddddd dddddd ddddddd dddddddd"),
        (FRAMES_OF_3, AShape(1, 2), Nothing(), "s sw sww s.ww s..ww s...ww s....ww s.....ww"),
        (FRAMES_OF_3, TriShape(1, 2, last=2), Nothing(), "s sw sww s.ww s..ww s...ww ddddddd dddddddd"),
        (FRAMES_OF_3, VerticalSlash(sink=0, window=2), Lines(long(2, 3), long()),
         "w ww .ww ..ww ..|ww ..||ww ..||.ww ..||..ww"),
        (FRAMES_OF_3, VerticalSlash(sink=1, window=1), Lines(long(2), long(0)),
         "s sw s/w s//w s///w s////w s/////w s//////w"),
        (FRAMES_OF_3, Grid(sink=1, window=1), phases(1), "s sw s.w s.|w s.|.w s.|..w s.|..|w dddddddd"),
        (FRAMES_OF_3, Grid(vertical=False, horizontal=True, sink=0, window=1, tail=False), phases(2),
         "w .w ..w dddd ....w .....w ddddddd .......w"),
        (FRAMES_OF_3, Grid(slash=1, sink=0, window=1, tail=False), phases(0, shifts=[(0, 0)]),
         "w .w .|w .|.w .|..w .|/.|w .|./|.w .|..|..w"),
        (SEPARATED, Grid(sink=0, window=2), phases(0), "w ww .ww .|ww .|.ww .|.:ww .|.:|ww"),
        (SEPARATED, Blocks(), BlockSet(long(0), long(0, 1), long(0)), "b bb bbb bbbb bbbbb bbbbbb bbbbbbb"),
    ],
)  # fmt: skip
def test_parts_by_hand(tokens, pattern, chosen, expected):
    part_SS = part_of_pairs(whole(pattern, chosen), tokens)
    lines = ["".join(LETTERS[part] for part in row[: n + 1]) for n, row in enumerate(part_SS.tolist())]
    assert " ".join(lines) == expected
    assert not part_SS.triu(1).any()


def test_tiles_that_a_mask_touches():
    seen_SS = torch.zeros(5, 5, dtype=torch.bool)
    seen_SS[0, 0] = seen_SS[1, 1] = seen_SS[4, 3] = True
    assert [tiles_touched(seen_SS, tile) for tile in (1, 2, 4, 5, 8)] == [3, 2, 2, 1, 1]


def test_a_picture_pixel_by_pixel(tmp_path):
    """The mask to the left in cells of 3 x 3 pixels, the program to the right in tiles of 16."""
    unit = illustrate(NoBoundary(Grid(sink=4, window=32, horizontal=True)), VIDEO)
    file = draw_unit(unit, VIDEO, tmp_path / "grid.png", title="grid", note="made up")
    picture = imread(file)
    assert len(VIDEO) == 284 and scale_of(284) == Scale(pool=1, zoom=3) and default_tile(284) == 16
    [program] = permuted(unit, VIDEO, 16)
    assert program.row_groups == (("rows", 236), ("dense rows", 48)) and program.key_groups[1] == ("lines", 40)
    mask = MaskView(unit, VIDEO, part_of_pairs(unit, VIDEO).numpy(), Scale(1, 3))
    gap = 3 * 3
    assert len(picture) == TOP + (284 * 3 + gap) + AXIS + LINE + FOOT
    left, right = mask.margins
    start = left + 284 * 3 + right + 60
    assert picture.shape[1] > start + (284 + 40) * 3 + gap

    cells = hexes(picture[TOP : TOP + 284 * 3, left : left + 284 * 3])
    seen_SS, below = unit_mask(unit, VIDEO).numpy(), np.tri(284, dtype=bool)
    legend = np.s_[:40, 200:]  # words stand in the upper right corner
    plain = np.ones_like(below)
    plain[legend] = False
    assert (cells[0::3, 0::3] == cells[2::3, 2::3])[plain].all()
    assert ((cells[1::3, 1::3] == BACKGROUND) == ~below)[plain].all()
    assert ((cells[1::3, 1::3] == COLORS[Part.UNSEEN]) == (below & ~seen_SS))[plain].all()
    assert cells[-1, 0] == COLORS[Part.DENSE_ROWS]
    assert cells[200 * 3, 3 * 3] == COLORS[Part.SINK] and cells[200 * 3, 199 * 3] == COLORS[Part.WINDOW]
    assert cells[200 * 3, 24 * 3] == COLORS[Part.UNSEEN] and cells[200 * 3, 26 * 3] == COLORS[Part.SEPARATORS]

    middle = 20 + 28 + 14  # classes are 24 places, the chosen one is 12; a row of 6 has a newline behind it
    assert VIDEO.place[middle] == 12 and cells[200 * 3, middle * 3] == COLORS[Part.LINES]
    last = hexes(picture[TOP + 283 * 3 + gap, start : start + 284 * 3 : 3])
    assert last[0] == dark(COLORS[Part.DENSE_ROWS]) and last[283] == COLORS[Part.DENSE_ROWS]
    first = hexes(picture[TOP, start : start + 284 * 3 : 3])
    assert first.tolist() == [COLORS[Part.SINK]] + [HIDDEN] * 15 + [COLORS[Part.UNSEEN]] * 268
    assert hexes(picture[TOP : TOP + 1, start + 284 * 3 : start + 284 * 3 + gap]).tolist() == [[BACKGROUND] * gap]

    band = hexes(picture[TOP - APART - FRAMES // 2, left : left + 284 * 3 : 3])
    assert band[0] == MODALITIES[Modality.TEXT] and band[20] == MODALITIES[Modality.VIDEO] and band[26] == SEPARATOR
    assert band[20 + 28] not in (band[20], SEPARATOR) and band[20 + 56] == band[20]
    assert hexes(picture[TOP - BANDS + 1 : TOP - BANDS + 2, left + 21 * 3]).tolist() == [MODALITIES[Modality.VIDEO]]
    assert hexes(picture[TOP : TOP + 284 * 3 : 3, left - APART - FRAMES // 2]).tolist() == band.tolist()


def test_long_prompts_are_pooled_so_that_lines_stay(tmp_path):
    tokens = token_map(Text(60), Media(10, 12, 16), Text(100))
    unit = whole(Grid(sink=0, window=1, tail=False), phases(7))
    picture = imread(draw_unit(unit, tokens, tmp_path / "pooled.png", title="pooled"))
    scale, side = scale_of(len(tokens)), -(-len(tokens) // 4)
    assert len(tokens) == 2080 and scale == Scale(pool=4, zoom=2)
    left = MaskView(unit, tokens, part_of_pairs(unit, tokens).numpy(), scale).margins[0]
    row = hexes(picture[TOP + 2 * (side - 1), left : left + 2 * side : 2])
    columns = {(60 + frame * 192 + 7) // 4 for frame in range(10)}
    assert {n for n, color in enumerate(row) if color == COLORS[Part.LINES]} == columns
    assert scale_of(1024) == Scale(1, 1) and scale_of(1025).pool == 2 and scale_of(LONGEST).pool == 4


def test_panels_are_outlined(tmp_path):
    """Dashes, in black, right of the diagonal's start in each row and column where the modality changes."""
    for plan, by_keys in ((QBoundary(), False), (Boundary2D(), True)):
        unit = illustrate(plan, MIXED)
        picture = imread(draw_unit(unit, MIXED, tmp_path / "outlined.png", title="outlined"))
        zoom = scale_of(len(MIXED)).zoom
        left = MaskView(unit, MIXED, part_of_pairs(unit, MIXED).numpy(), scale_of(len(MIXED))).margins[0]
        black = (picture[TOP:, left:, :3] < 0.2).all(-1)
        for at in (78, 98, 242):
            y = x = at * zoom
            assert black[y - 1 : y + 1, : x - 10].any(0).mean() > 0.4
            assert (black[y + 10 : len(MIXED) * zoom - 5, x - 1 : x + 1].any(1).mean() > 0.4) == by_keys


@pytest.mark.parametrize(
    ("plan", "programs"),
    [
        (NoBoundary(Grid(sink=4, window=16, slash=2)), 2),
        (QBoundary(text=VerticalSlash(12, 128, 4, 16), video=Grid(sink=4, window=16)), 1),
        (Boundary2D({"video-video": Grid(sink=4, window=16, horizontal=True), "text-video": AShape(4, 16)}), 1),
        (NoBoundary(Blocks()), 1),
    ],
)
def test_every_boundary_can_be_drawn(tmp_path, plan, programs):
    unit = illustrate(plan, MIXED)
    file = draw_unit(unit, MIXED, tmp_path / "any.png", title="any", tile=32)
    assert len(permuted(unit, MIXED, 32)) == programs
    assert 10_000 < file.stat().st_size < 400_000
    assert imread(file).shape[1] > (1 + programs) * len(MIXED) * scale_of(len(MIXED)).zoom


def test_names_of_lists_and_rows():
    pairs = {
        "video-video": Grid(sink=4, window=16, horizontal=True, slash=1, tail=False),
        "text-video": VerticalSlash(),
    }
    main, shifts = permuted(illustrate(Boundary2D(pairs), MIXED), MIXED, 16)
    assert [name for name, _ in main.row_groups] == [
        "dense text rows", "dense image rows", "video rows", "dense video rows",
    ]  # fmt: skip
    assert [name for name, _ in main.key_groups] == [
        "text keys", "image keys", "video keys by block", "video keys", "video lines", "video lines",
    ]  # fmt: skip
    assert (shifts.row_groups, shifts.key_groups) == ((("video rows by class", 138),), (("keys by class", 192),))


def test_no_program_without_rows():
    """Every class is a horizontal line: no row is left for class differences."""
    unit = whole(Grid(horizontal=True, slash=1), phases(0, 1, 2, shifts=[(0, 0)]))
    assert len(permuted(unit, FRAMES_OF_3, 16)) == 1


def test_a_head_of_a_plan_and_a_whole_layer(tmp_path):
    plan = one_of_each(MODEL)
    one = imread(draw_plan(plan, 1, 3, MIXED, tmp_path / "head.png"))
    everyone = imread(draw_plan(plan, 1, None, MIXED, tmp_path / "layer.png"))
    colors = np.unique(hexes(everyone[::2, ::2]))
    assert one.shape != everyone.shape
    assert {COLORS[part] for part in Part} - set(colors) == {COLORS[Part.SEPARATORS]}, "which this prompt lacks"
    assert colors.size < 600  # letters are grey in many shades; masks add none


def test_heads_that_share_are_drawn_together(tmp_path):
    grid, dense = NoBoundary(Grid()), NoBoundary(Dense())
    layer = LayerPlan((GroupPlan(group=grid), GroupPlan(heads=(dense, grid, dense, dense))))
    plan = Plan(MODEL, (layer, layer))
    shared = [draw_plan(plan, 0, head, MIXED, tmp_path / f"{head}.png").read_bytes() for head in (0, 3)]
    alone = draw_plan(plan, 0, 5, MIXED, tmp_path / "5.png").read_bytes()
    assert shared[0] == shared[1] != alone


@pytest.mark.parametrize(
    ("layer", "head", "given"), [(2, 0, "layer 2"), (-1, 0, "layer -1"), (0, 8, "head 8"), (0, -1, "head -1")]
)
def test_what_a_plan_lacks(tmp_path, layer, head, given):
    with pytest.raises(ConfigError) as raised:
        draw_plan(one_of_each(MODEL), layer, head, MIXED, tmp_path / "none.png")
    assert raised.value.given == given and not list(tmp_path.iterdir())


def test_prompts_too_long_to_draw(tmp_path):
    tokens = token_map(Text(LONGEST + 1))
    with pytest.raises(ConfigError, match=f"a picture of 4097 tokens. Allowed: up to {LONGEST}"):
        draw_unit(whole(Dense(), Nothing()), tokens, tmp_path / "none.png", title="long")
    with pytest.raises(ConfigError, match=f"a picture of 4097 tokens. Allowed: up to {LONGEST}"):
        draw_plan(one_of_each(MODEL), 0, None, tokens, tmp_path / "none.png")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"absent/none\.png: No such file"):
        draw_plan(one_of_each(MODEL), 0, 0, MIXED, tmp_path / "absent" / "none.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"without matplotlib\. .* pip install 'sglang_mm\[draw\]'"):
        draw_plan(one_of_each(MODEL), 0, 0, MIXED, tmp_path / "none.png")


def test_the_pictures_of_the_documents_are_what_the_command_writes(tmp_path, capsys):
    """Below the words in the corner, pixel by pixel: letters may differ from one font to the next."""
    examples.main(tmp_path)
    assert [line.endswith(".png written") for line in capsys.readouterr().out.splitlines()] == [True] * 3
    for name in examples.EXAMPLES:
        new, kept = tmp_path / f"{name}.png", examples.FOLDER / f"{name}.png"
        assert kept.stat().st_size < 300_000
        new, kept = imread(new), imread(kept)
        assert new.shape == kept.shape
        masks = np.s_[TOP + 200 : TOP + 800, 120:700]
        assert (new[masks] == kept[masks]).all() and len(np.unique(hexes(new[masks]))) > 4


def test_default_tiles():
    assert [default_tile(tokens) for tokens in (1, 100, 1023, 1024, 2048, 4095, 4096)] == [16, 16, 16, 32, 64, 64, 128]
