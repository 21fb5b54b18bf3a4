"""Numbers that a pattern cannot have are refused where it is made, in a message that starts with the field."""

import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash

LARGEST = 2**31 - 1  # what an int32 bound of a tile program can hold


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda: AShape(sink=-1), "sink: -1 in AShape"),
        (lambda: AShape(window=0), "window: 0 in AShape"),
        (lambda: AShape(window=LARGEST + 1), f"window: {LARGEST + 1} in AShape"),
        (lambda: AShape(window=2.5), "window: 2.5 in AShape"),
        (lambda: TriShape(last=-1), "last: -1 in TriShape"),
        (lambda: VerticalSlash(vertical=-1), "vertical: -1 in VerticalSlash"),
        (lambda: VerticalSlash(slash=-1), "slash: -1 in VerticalSlash"),
        (lambda: VerticalSlash(window=0), "window: 0 in VerticalSlash"),
        (lambda: Grid(phases=0), "phases: 0 in Grid"),
        (lambda: Grid(slash=-1), "slash: -1 in Grid"),
        (lambda: Grid(axis="diagonal"), "axis: 'diagonal' in Grid"),
        (lambda: Grid(vertical=False), "vertical, horizontal, slash: none in Grid"),
        (lambda: AShape(window=True), "window: True in AShape"),
        (lambda: Grid(vertical=5), "vertical: 5 in Grid"),
        (lambda: Blocks(0.0), "threshold: 0.0 in Blocks"),
        (lambda: Blocks(True), "threshold: True in Blocks"),
        (lambda: Blocks("0.9"), "threshold: '0.9' in Blocks"),
        (lambda: Blocks(1.1), "threshold: 1.1 in Blocks"),
        (lambda: Blocks(float("nan")), "threshold: nan in Blocks"),
    ],
)
def test_out_of_range(make, given):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.given == given


def test_the_ends_of_the_ranges_are_allowed():
    assert AShape(sink=0, window=1) != AShape(sink=0, window=LARGEST)
    assert [TriShape(last=0).last, VerticalSlash(0, 0, 0, 1).vertical, Blocks(1.0).threshold] == [0, 0, 1.0]
    assert Grid(vertical=False, horizontal=True) != Grid(vertical=False, slash=1) and Dense() == Dense()
