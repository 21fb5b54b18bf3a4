"""Masks drawn by hand: x where a row (downwards) sees a key (to the right)."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Nothing, Panel, Phases, Unit
from sglang_mm.patterns.masks import mask, unit_mask
from sglang_mm.types import Axis, Modality
from tests.patterns.maps import Media, Text, token_map

TEXT = token_map(Text(6))
FRAMES = token_map(Text(1), Media(frames=2, rows=1, cols=3), Text(1))
SEPARATED = token_map(Text(1), Media(frames=2, rows=2, cols=1, newline=True))
LONG = token_map(Text(400))
TWO_VIDEOS = token_map(Media(2, 1, 2), Media(2, 1, 2))


def picture(seen_SS: torch.Tensor) -> str:
    return " ".join("".join("x" if seen else "." for seen in row) for row in seen_SS.tolist())


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def phases(*classes: int, shifts=(), axis=Axis.FRAME) -> Phases:
    return Phases(axis, long(*classes), torch.tensor(shifts, dtype=torch.int64).view(-1, 2))


NONE = Nothing()


@pytest.mark.parametrize(
    ("pattern", "tokens", "chosen", "expected"),
    [
        (Dense(), TEXT, NONE, "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx"),
        (AShape(sink=1, window=2), TEXT, NONE, "x..... xx.... xxx... x.xx.. x..xx. x...xx"),
        (AShape(sink=0, window=1), TEXT, NONE, "x..... .x.... ..x... ...x.. ....x. .....x"),
        (TriShape(sink=1, window=1, last=2), TEXT, NONE, "x..... xx.... x.x... x..x.. xxxxx. xxxxxx"),
        (VerticalSlash(sink=0, window=1), TEXT, Lines(long(2), long()), "x..... .x.... ..x... ..xx.. ..x.x. ..x..x"),
        (VerticalSlash(sink=0, window=1), TEXT, Lines(long(), long(0)), "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx"),
        # t p0 p1 p2 p0 p1 p2 t: vertical lines at place 1
        (
            Grid(sink=0, window=1, tail=False),
            FRAMES,
            phases(1),
            "x....... .x...... ..x..... ..xx.... ..x.x... ..x..x.. ..x..xx. ..x..x.x",
        ),
        # rows at place 1 see everything, and so does the text after the video
        (
            Grid(vertical=False, horizontal=True, sink=0, window=1),
            FRAMES,
            phases(1),
            "x....... .x...... xxx..... ...x.... ....x... xxxxxx.. ......x. xxxxxxxx",
        ),
        # place - place == 1 modulo 3: p0 sees p2, p1 sees p0, p2 sees p1
        (
            Grid(vertical=False, slash=1, sink=0, window=1, tail=False),
            FRAMES,
            phases(shifts=[(0, 1)]),
            "x....... .x...... .xx..... ..xx.... ...xx... .x..xx.. ..x..xx. .......x",
        ),
        # t c0 n c0 n c0 n c0 n: newlines show always; on the row axis a column of one is every place
        (
            Grid(axis="row", sink=0, window=1, tail=False),
            SEPARATED,
            phases(axis=Axis.ROW),
            "x........ .x....... ..x...... ..xx..... ..x.x.... ..x.xx... ..x.x.x.. ..x.x.xx. ..x.x.x.x",
        ),
        (
            Grid(axis="row", sink=0, window=1, tail=False),
            SEPARATED,
            phases(0, axis=Axis.ROW),
            "x........ .x....... .xx...... .xxx..... .xxxx.... .xxxxx... .xxxxxx.. .xxxxxxx. .xxxxxxxx",
        ),
        # two videos share classes, so lines go through both, but differences of classes stay inside one
        (
            Grid(sink=0, window=1, tail=False),
            TWO_VIDEOS,
            phases(0),
            "x....... xx...... x.x..... x.xx.... x.x.x... x.x.xx.. x.x.x.x. x.x.x.xx",
        ),
        (
            Grid(vertical=False, slash=1, sink=0, window=1, tail=False),
            TWO_VIDEOS,
            phases(shifts=[(0, 0)]),
            "x....... .x...... x.x..... .x.x.... ....x... .....x.. ....x.x. .....x.x",
        ),
    ],
)
def test_small_masks(pattern, tokens, chosen, expected):
    assert picture(mask(pattern, tokens, chosen)) == expected


def runs(seen_S: torch.Tensor) -> list[tuple[int, int]]:
    """[first, stop) of each stretch of keys that a row sees."""
    change = torch.nn.functional.pad(seen_S.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(change[::2], change[1::2]))


@pytest.mark.parametrize(
    ("diagonals", "row", "expected"),
    [
        ((1,), 300, [(128, 256), (300, 301)]),
        ((1,), 255, [(0, 128), (255, 256)]),
        ((1,), 127, [(127, 128)]),
        ((0,), 300, [(256, 301)]),
        ((2, 3), 399, [(0, 256), (399, 400)]),
    ],
)
def test_slashes_are_diagonals_of_blocks(diagonals, row, expected):
    seen_SS = mask(VerticalSlash(sink=0, window=1), LONG, Lines(long(), long(*diagonals)))
    assert runs(seen_SS[row]) == expected


@pytest.mark.parametrize(("row", "expected"), [(100, []), (200, [(0, 201)]), (300, [(0, 128), (256, 301)]), (399, [])])
def test_blocks_are_those_of_the_row_blocks_list(row, expected):
    seen_SS = mask(Blocks(), LONG, BlockSet(long(1, 2), long(0, 2, 4), long(0, 1, 0, 2)))
    assert runs(seen_SS[row]) == expected


@pytest.mark.parametrize(
    ("pattern", "tokens", "chosen", "expected"),
    [
        (TriShape(sink=1, window=1, last=2), TEXT, NONE, "x..... xx.... x.x... x..x.. x...x. x....x"),
        (
            Grid(horizontal=True, sink=0, window=1),
            FRAMES,
            phases(1),
            "x....... .x...... ..x..... ..xx.... ..x.x... ..x..x.. ..x..xx. ..x..x.x",
        ),
        (Dense(), TEXT, NONE, "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx"),
    ],
)
def test_dense_rows_can_be_taken_as_sparse(pattern, tokens, chosen, expected):
    unit = Unit((0,), (Panel(None, None, pattern, chosen),))
    assert picture(unit_mask(unit, tokens, sparse_rows=True)) == expected


def test_panels_of_a_unit_share_no_entry_and_leave_none_out():
    video, text = Modality.VIDEO, Modality.TEXT
    unit = Unit(
        (0,),
        (
            Panel(text, text, Dense(), NONE),
            Panel(text, video, AShape(sink=2, window=1), NONE),
            Panel(video, text, AShape(sink=0, window=1), NONE),
            Panel(video, video, Grid(sink=0, window=1), phases(1)),
        ),
    )
    expected = "x....... .x...... ..x..... ..xx.... ..x.x... ..x..x.. ..x..xx. xx.....x"
    assert picture(unit_mask(unit, FRAMES)) == expected


@pytest.mark.parametrize(
    ("pattern", "chosen"), [(Grid(), NONE), (AShape(), phases(1)), (Blocks(), Lines(long(), long()))]
)
def test_a_choice_for_another_pattern_is_refused(pattern, chosen):
    with pytest.raises(ConfigError, match=f"{type(chosen).__name__} for {type(pattern).__name__}"):
        mask(pattern, TEXT, chosen)
