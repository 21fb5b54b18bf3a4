"""TokenMap and its classes, on maps written by hand."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.types import Axis, Modality, Place, TokenMap

T, I, V = Modality.TEXT, Modality.IMAGE, Modality.VIDEO  # noqa: E741


def token_map(rows: list[tuple], grids=()) -> TokenMap:
    """rows: (modality, item, frame, place, col, span) of each token."""
    modality, item, frame, place, col, span = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows))
    return TokenMap(modality.to(torch.uint8), item, frame, place, col, span, tuple(grids))


@pytest.fixture
def mixed() -> TokenMap:
    """t, video 2 x (1 x 2) with a newline and a timestamp, t v, image 2 x 1, e t, image 1 x 2, t t."""
    n, s = Place.NEWLINE, Place.TIMESTAMP
    return token_map(
        [
            (T, -1, -1, -1, -1, 0),
            (V, 0, 0, 0, 0, 1),
            (V, 0, 0, 1, 1, 1),
            (V, 0, 0, n, -1, 1),
            (V, 0, 1, s, -1, 1),
            (V, 0, 1, 0, 0, 1),
            (V, 0, 1, 1, 1, 1),
            (V, 0, 1, n, -1, 1),
            (T, -1, -1, -1, -1, 2),
            (T, -1, -1, Place.VISION_START, -1, 2),
            (I, 1, 0, 0, 0, 3),
            (I, 1, 0, 1, 0, 3),
            (T, -1, -1, Place.VISION_END, -1, 4),
            (T, -1, -1, -1, -1, 4),
            (I, 2, 0, 0, 0, 5),
            (I, 2, 0, 1, 1, 5),
            (T, -1, -1, -1, -1, 6),
            (T, -1, -1, -1, -1, 6),
        ],
        [(1, 2), (2, 1), (1, 2)],
    )


def test_separators_are_all_that_is_neither_text_nor_place(mixed):
    assert mixed.separators.nonzero().flatten().tolist() == [3, 4, 7, 9, 12]


def test_frame_classes(mixed):
    """Name space (1, 2) has classes 0, 1 and (2, 1) has 2, 3; the image of 1 x 2 shares the video's."""
    classes = mixed.classes(Axis.FRAME)
    assert classes.of_token.tolist() == [-1, 0, 1, -1, -1, 0, 1, -1, -1, -1, 2, 3, -1, -1, 0, 1, -1, -1]
    assert classes.of_token.dtype == torch.int32
    assert classes.starts == (0, 2, 4) and len(classes) == 4
    assert classes.counts.tolist() == [3, 3, 1, 1]
    assert classes.spaces.tolist() == [0, 0, 1, 1]


def test_row_classes(mixed):
    classes = mixed.classes(Axis.ROW)
    assert classes.of_token.tolist() == [-1, 0, 1, -1, -1, 0, 1, -1, -1, -1, 2, 2, -1, -1, 0, 1, -1, -1]
    assert classes.starts == (0, 2, 3) and classes.spaces.tolist() == [0, 0, 1]
    assert classes.counts.tolist() == [3, 3, 2]


def test_classes_are_built_once(mixed):
    assert mixed.classes(Axis.ROW) is mixed.classes(Axis.ROW) is not mixed.classes(Axis.FRAME)


def test_modalities_and_tail(mixed):
    assert mixed.modalities == (T, I, V)
    assert mixed.tail == 16
    assert token_map([(I, 0, 0, 0, 0, 0)], [(1, 1)]).tail == 1


@pytest.mark.parametrize(
    ("modality", "rows", "expected"),
    [(None, 3, [15, 16, 17]), (None, 64, list(range(18))), (T, 1, [17]), (T, 64, [16, 17]), (I, 64, [14, 15])],
)
def test_probe_rows_are_the_last_of_the_last_span(mixed, modality, rows, expected):
    assert mixed.probe_rows(modality, rows).tolist() == expected


def test_probe_rows_of_a_video_end_with_its_newline(mixed):
    assert mixed.probe_rows(V).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert mixed.probe_rows(V, 2).tolist() == [6, 7]


def test_text_alone_has_no_classes():
    text = token_map([(T, -1, -1, -1, -1, 0)] * 5)
    assert len(text) == 5 and text.tail == 5 and text.modalities == (T,) and not text.separators.any()
    for axis in Axis:
        classes = text.classes(axis)
        assert len(classes) == 0 and classes.starts == (0,)
        assert classes.of_token.tolist() == [-1] * 5 and not len(classes.counts) and not len(classes.spaces)
    with pytest.raises(ConfigError, match="probe rows of video"):
        text.probe_rows(V)


def test_columns_must_have_one_length():
    column = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"\[3, 3, 2, 3, 3, 3\]"):
        TokenMap(column, column, column[:2], column, column, column, ())
    with pytest.raises(ConfigError, match="one token or more"):
        TokenMap(*[column[:0]] * 6, ())


def test_a_map_moves_as_a_whole(mixed):
    moved = mixed.to("meta")
    assert {column.device.type for column in vars(moved).values() if isinstance(column, torch.Tensor)} == {"meta"}
    assert len(moved) == len(mixed) and moved.grids == mixed.grids
