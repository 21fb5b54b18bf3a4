"""Wrong readings of grids and boundaries: each is applied here and seen to be wrong, and the real thing right."""

from dataclasses import replace

import pytest
import torch

from sglang_mm.kernels import empty_state, merge
from sglang_mm.patterns.catalog import AShape, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import Lines, Nothing, Panel, Phases, Unit
from sglang_mm.types import Axis, Modality, Place, TokenMap
from tests import token_maps
from tests.exactness.controls import assert_right, assert_wrong
from tests.exactness.layers import Layer, one_rank, single, times_shown_by
from tests.exactness.oracle import errors

pytestmark = pytest.mark.usefixtures("nan_poison", "one_thread")
NO_SHIFTS = torch.zeros(0, 2, dtype=torch.int64)


def test_each_pair_of_modalities_with_a_softmax_of_its_own():
    """Algorithm 3 as printed. Merged by log-sum-exp, the same partial results are right."""
    text, video = Modality.TEXT, Modality.VIDEO
    lines = Lines(torch.arange(3, 200, 5), torch.tensor([1]))
    panels = (
        Panel(text, text, Dense(), Nothing()),
        Panel(text, video, AShape(40, 30), Nothing()),
        Panel(video, text, VerticalSlash(sink=4, window=9), lines),
        Panel(video, video, Grid("frame", sink=2, window=20), Phases(Axis.FRAME, torch.tensor([5, 9]), NO_SHIFTS)),
    )
    layer = one_rank(token_maps.timestamped_video(14, 4, 6), Unit((0,), panels))
    assert_right(layer)
    qkv = layer.random_qkv()
    parts = [one_rank(layer.tokens, Unit((0,), (panel,))).attend(*qkv) for panel in panels]
    joint = layer.attend(*qkv)

    merged = empty_state(qkv[0])
    for part in parts:
        merge(*merged, *part)
    assert max(errors(merged, joint)) < 1e-13
    each_for_itself = sum(out for out, _ in parts), joint[1]
    assert errors(each_for_itself, joint)[0] > 1


def modulo_classes(tokens: TokenMap) -> TokenMap:
    """The paper's classes: distance from the first frame, modulo the distance of the first two frames."""
    starts = [int(((tokens.frame == frame) & (tokens.place == 0)).nonzero()[0]) for frame in (0, 1)]
    first, stride = starts[0], starts[1] - starts[0]
    last = int((tokens.place >= 0).nonzero()[-1])
    place, (rows, cols) = tokens.place.clone(), tokens.grids[0]
    phase = (torch.arange(first, last + 1) - first) % stride
    place[first : last + 1] = torch.where(phase < rows * cols, phase, Place.TIMESTAMP).int()
    return replace(tokens, place=place, col=torch.where(place >= 0, place % cols, -1))


def vertical_lines(tokens: TokenMap) -> Layer:
    return one_rank(
        tokens, single(Grid("frame", sink=2, window=20), Phases(Axis.FRAME, torch.tensor([5, 9]), NO_SHIFTS))
    )


def test_classes_modulo_a_stride():
    """Right where frames are evenly apart, wrong where a timestamp of other length lies between two of them."""
    even, uneven = token_maps.uniform_video(14, 4, 6), token_maps.timestamped_video(14, 4, 6)
    assert torch.equal(modulo_classes(even).place, even.place)
    assert_right(vertical_lines(even))
    assert_wrong(vertical_lines(uneven), vertical_lines(modulo_classes(uneven)).programs, off_by=0.1, twice=False)


SHIFTED = Phases(Axis.FRAME, torch.tensor([5, 9]), torch.tensor([[0, 1], [0, 4]]))


@pytest.mark.parametrize("lines", ["vertical", "horizontal"])
def test_class_differences_that_do_not_know_of_lines(lines):
    """Keys on a vertical line, and rows on a horizontal one, are answered by the main program already."""
    grid = Grid("frame", vertical=lines == "vertical", horizontal=lines == "horizontal", slash=2, sink=2, window=20)
    without_lines = Grid("frame", vertical=False, slash=2, sink=2, window=20)
    tokens = token_maps.uniform_video(14, 4, 6)
    layer = one_rank(tokens, single(grid, SHIFTED))
    main, differences = layer.programs[:1], layer.programs[1:]
    forgetful = one_rank(tokens, single(without_lines, SHIFTED)).programs[1:]
    assert len(differences) == len(forgetful) == 1
    assert_wrong(layer, [*main, *forgetful], off_by=0.1, twice=True)
    assert int(times_shown_by([*main, *differences]).max()) == 1
