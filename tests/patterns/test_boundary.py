"""Which panels a head plan means in a prompt, and what is refused for a pair."""

import pytest

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import PAIRS, Boundary2D, KBoundary, NoBoundary, QBoundary, panels
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, TriShape, VerticalSlash
from sglang_mm.types import Modality

TEXT, IMAGE, VIDEO = Modality
NEAR, LINES = AShape(sink=1, window=2), Grid(tail=False)
ALWAYS = [Dense(), AShape(), VerticalSlash(), Blocks()]
MORE = [Grid(), Grid(horizontal=True, tail=False), Grid(slash=1, tail=False), TriShape()]
WITHOUT_VERTICAL = Grid(vertical=False, slash=1, tail=False)


@pytest.mark.parametrize("boundary", [NoBoundary, KBoundary])
def test_one_panel_without_a_boundary_between_rows(boundary):
    assert panels(boundary(NEAR), [TEXT, VIDEO]) == [(None, None, NEAR)]


def test_one_panel_per_modality_of_the_rows():
    plan = QBoundary(text=NEAR, video=LINES)
    assert panels(plan, [VIDEO, TEXT]) == [(TEXT, None, NEAR), (VIDEO, None, LINES)]
    assert panels(plan, Modality) == [(TEXT, None, NEAR), (IMAGE, None, Dense()), (VIDEO, None, LINES)]


def test_one_panel_per_pair_and_dense_where_none_is_named():
    plan = Boundary2D({"text-video": LINES, "video-video": NEAR, "image-image": NEAR})
    assert panels(plan, [TEXT, VIDEO]) == [
        (TEXT, TEXT, Dense()),
        (TEXT, VIDEO, LINES),
        (VIDEO, TEXT, Dense()),
        (VIDEO, VIDEO, NEAR),
    ]
    assert len(panels(plan, Modality)) == 9 and panels(plan, [TEXT]) == [(TEXT, TEXT, Dense())]


LEGAL = {
    ("video-video", "image-image"): [*ALWAYS, LINES, *MORE, WITHOUT_VERTICAL],
    ("text-video", "text-image", "video-image", "image-video"): [*ALWAYS, LINES],
    ("video-text", "image-text", "text-text"): ALWAYS,
}
EVERY = LEGAL["video-video", "image-image"]
CASES = [(pair, pattern, pattern in legal) for names, legal in LEGAL.items() for pair in names for pattern in EVERY]


def test_the_cases_have_every_pair():
    assert {pair for pair, _, _ in CASES} == set(PAIRS) and len(PAIRS) == 9


@pytest.mark.parametrize(("pair", "pattern", "is_legal"), CASES)
def test_legal_patterns_of_a_pair(pair, pattern, is_legal):
    if is_legal:
        assert Boundary2D({pair: pattern}).pairs == {pair: pattern}
        return
    with pytest.raises(ConfigError) as caught:
        Boundary2D({pair: pattern})
    assert caught.value.given == f"pairs.{pair}: {pattern}"
    assert caught.value.allowed.startswith("dense, a_shape, vertical_slash, blocks")
    assert ("grid with vertical lines alone" in caught.value.allowed) == (pair.partition("-")[2] != "text")


@pytest.mark.parametrize("name", ["video", "video-txt", "text_video", "", "audio-text"])
def test_an_unknown_pair_is_refused(name):
    with pytest.raises(ConfigError, match=r"text-text \| text-image") as caught:
        Boundary2D({name: Dense()})
    assert caught.value.given == f"pairs.{name}"
