"""The builder that all families share: what joins a video, where spans end, what is refused."""

import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.modality import Item, Wraps, build_token_map, frame_places
from sglang_mm.types import Axis, Modality, Place
from tests.modality.script import END, START, TEXT, WRAPS, Script, columns_of

S, E, N, F, X = Place.VISION_START, Place.VISION_END, Place.NEWLINE, Place.END_OF_FRAME, Place.TIMESTAMP


def build(script: Script, places=None, closing=()):
    """Items straight from the script: a frame starts at each place 0."""
    items = []
    for number, (modality, grid) in enumerate(script.media):
        starts = [i for i, token in enumerate(script.tokens) if token.item == number and token.place == 0]
        shape = frame_places(*grid) if places is None else places
        items.append(Item(modality, grid, torch.tensor(starts), shape, closing))
    return build_token_map(script.ids(), items, WRAPS)


def test_the_drawing_of_the_module():
    """Values by hand, so that the oracle of the other tests is tested too."""
    script = Script().text(2).start().item(Modality.VIDEO, 1, 3).frame().end().text(2).start().frame().end()
    script.text(1).start().image(2, 2).end().text(1)
    expected = {
        "modality": [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 1, 1, 1, 1, 0, 0],
        "item": [-1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, -1, -1],
        "frame": [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, -1, -1, -1, 0, 0, 0, 0, -1, -1],
        "place": [-1, -1, S, 0, 1, 2, E, X, X, S, 0, 1, 2, E, -1, S, 0, 1, 2, 3, E, -1],
        "col": [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1, 0, 1, 2, -1, -1, -1, 0, 1, 0, 1, -1, -1],
        "span": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4],
    }
    assert columns_of(build(script)) == expected == script.expected()


def test_types_are_as_documented():
    built = build(Script().text(1).image(1, 1))
    assert built.modality.dtype == torch.uint8
    assert {getattr(built, name).dtype for name in ("item", "frame", "place", "col", "span")} == {torch.int32}
    assert built.grids == ((1, 1),)


@pytest.mark.parametrize(
    ("text", "modality", "spans"), [(0, 2, 3), (1, 2, 3), (61, 2, 3), (62, 0, 5), (200, 0, 5)], ids=str
)
def test_r1_and_r3_a_gap_of_64_tokens_is_text(text, modality, spans):
    """text + vision end + vision start between two frames: 63 join, 64 do not."""
    script = Script().text(3).item(Modality.VIDEO, 2, 2).frame().end().text(text).start().frame().text(2)
    built = build(script)
    assert columns_of(built) == script.expected()
    gap = slice(7, 9 + text)
    assert set(built.modality[gap].tolist()) == {modality} and int(built.span[-1]) + 1 == spans
    assert built.place[gap].tolist() == [E, *[X if modality else -1] * text, S]
    assert built.frame[gap].tolist() == ([0, *[1] * text, 1] if modality else [-1] * (text + 2))
    assert built.item[-3] == 0 and built.frame[-3] == 1, "the second frame is of the same video"


@pytest.mark.parametrize("gap", [63, 64])
def test_text_between_two_items_is_a_span_at_any_length(gap):
    script = Script().video(2, 1, 2).text(gap).video(2, 1, 2).text(1).image(1, 2)
    built = build(script)
    assert columns_of(built) == script.expected()
    assert not built.modality[4 : 4 + gap].any() and built.span[-1] == 4


@pytest.mark.parametrize(
    "script",
    [
        Script().text(5),
        Script().image(2, 3),
        Script().start().image(2, 3).end(),
        Script().video(1, 2, 3),
        Script().video(3, 2, 3).text(4),
        Script().text(4).video(3, 2, 3),
        Script().image(2, 3).image(2, 3).image(3, 2),
        Script().start().image(2, 3).end().start().image(2, 3).end(),
        Script().video(2, 2, 3).video(2, 2, 3),
        Script().text(1).start().start().image(1, 1).end().end().text(1),
        Script().text(2).start().text(1).image(1, 1).text(1).end(),
        Script().start().text(63).start(),
    ],
    ids=[
        "text alone", "image alone", "image in wraps", "one frame", "video first", "video last", "adjacent images",
        "adjacent images in wraps", "adjacent videos", "doubled wraps", "wraps apart from media", "wraps without media",
    ],
)  # fmt: skip
def test_shapes_of_prompts(script):
    assert columns_of(build(script)) == script.expected()


def test_newlines_ends_and_closing_tokens_belong_to_the_frame_they_close():
    script = Script().text(1)
    script.video(2, 2, 2, newline=True, end="own").closing().text(1)
    places = frame_places(2, 2, newline=True, end=1)
    assert places.tolist() == [0, 1, N, 2, 3, N, F] and places.dtype == torch.int32
    built = build(script, places, (Place.NEWLINE,))
    assert columns_of(built) == script.expected()
    assert built.frame.tolist() == [-1, *[0] * 7, *[1] * 7, 1, -1]
    assert built.place[-3:].tolist() == [F, N, -1] and built.span.unique().tolist() == [0, 1, 2]


def test_an_end_right_after_closing_tokens_is_found():
    script = Script().video(1, 1, 2).closing().end().text(1)
    built = build(script, closing=(Place.NEWLINE,))
    assert columns_of(built) == script.expected() and built.place[3] == E


def test_without_wraps_their_ids_are_text():
    places, ids = frame_places(1, 1), torch.tensor([START, TEXT, END])
    item = Item(Modality.IMAGE, (1, 1), torch.tensor([1]), places)
    assert build_token_map(ids, [item]).place.tolist() == [-1, 0, -1]
    assert build_token_map(ids, [item], Wraps(START)).place.tolist() == [S, 0, -1]


def test_ids_of_media_do_not_matter():
    item = Item(Modality.VIDEO, (1, 2), torch.tensor([0, 2]), frame_places(1, 2))
    assert build_token_map(torch.tensor([END, START, END, START]), [item], WRAPS).place.tolist() == [0, 1, 0, 1]


def item(starts, grid=(1, 2), places=None):
    return Item(Modality.VIDEO, grid, torch.tensor(starts), frame_places(*grid) if places is None else places)


@pytest.mark.parametrize(
    ("items", "given"),
    [
        (lambda: [item([8])], "video 0 up to 10"),
        (lambda: [item([0]), item([1])], "video 1 at 1, where the one before reaches to 2"),
        (lambda: [item([4]), item([0])], "video 1 at 0"),
        (lambda: [item([-1])], "video 0 at -1"),
        (lambda: [item([0, 1])], "frames of 2 tokens overlap"),
        (lambda: [item([4, 0])], "frames of 2 tokens overlap"),
        (lambda: [item([0, 6]), item([3])], "reaches to 8"),
        (lambda: [item(torch.zeros(0, dtype=torch.int64).tolist())], "without frames"),
        (lambda: [item([0], (2, 2), frame_places(1, 2))], "2 x 2 with 2 places"),
        (lambda: [item([0], (0, 2), frame_places(1, 2))], "0 x 2"),
        (lambda: [item([0], places=torch.tensor([1, 0]))], "with 2 places"),
    ],
    ids=[
        "beyond", "overlap", "order", "negative", "frames overlap", "frames out of order", "one inside another",
        "no frames", "grid too large", "empty grid", "places out of order",
    ],
)  # fmt: skip
def test_refused(items, given):
    with pytest.raises(ConfigError, match=given):
        build_token_map(torch.zeros(9, dtype=torch.int64), items())


def test_a_million_tokens():
    """4,000 frames of 16 x 16 with 6 tokens between them: positions and counts at the far end."""
    frames, stride = 4000, 16 * 16 + 6
    starts = torch.arange(frames) * stride
    built = build_token_map(torch.zeros(frames * stride + 9, dtype=torch.int64), [
        Item(Modality.VIDEO, (16, 16), starts, frame_places(16, 16))
    ])  # fmt: skip
    assert len(built) == 1_048_009 and built.tail == frames * stride - 6
    assert built.frame[built.tail - 1] == frames - 1 and built.place[built.tail - 1] == 255
    assert built.classes(Axis.FRAME).counts.tolist() == [frames] * 256
    assert int((built.place == X).sum()) == 6 * (frames - 1)
