"""The geometries that other tests build on are what their names say."""

from sglang_mm.types import Axis, Modality, Place
from tests import token_maps

TEXT, IMAGE, VIDEO = Modality


def runs(token_map) -> list[tuple[Modality, int]]:
    """(modality, tokens) of every span."""
    return [
        (Modality(int(own[0])), len(own))
        for span in range(int(token_map.span[-1]) + 1)
        if len(own := token_map.modality[token_map.span == span])
    ]


def test_tiny_mixed():
    token_map = token_maps.tiny_mixed()
    video, timed = 9 * (5 * 7 + 5), 4 * 15 + 3 + 4 + 5 + 3 * 2
    assert len(token_map) == 510 and token_map.grids == ((5, 7), (6, 4), (3, 5))
    assert runs(token_map) == [
        (TEXT, 17),
        (VIDEO, video),
        (TEXT, 12),
        (IMAGE, 24),
        (TEXT, 3),
        (VIDEO, timed),
        (TEXT, 16),
    ]
    assert token_map.tail == 494
    counts = {place: int((token_map.place == place).sum()) for place in Place}
    assert counts[Place.NEWLINE] == 45 and counts[Place.TIMESTAMP] == 12
    assert counts[Place.VISION_START] == counts[Place.VISION_END] == 5


def test_simple_geometries():
    assert runs(token_maps.text_only(50)) == [(TEXT, 50)]
    assert runs(token_maps.uniform_video(3, 2, 2, newline=True, end=1)) == [(TEXT, 20), (VIDEO, 21), (TEXT, 30)]
    timed = 3 * 4 + 3 + 4 + 2 * 2
    assert runs(token_maps.timestamped_video(3, 2, 2)) == [(TEXT, 21), (VIDEO, timed), (TEXT, 31)]
    assert [modality for modality, _ in runs(token_maps.interleaved())] == [
        TEXT, IMAGE, TEXT, VIDEO, TEXT, IMAGE, VIDEO
    ]  # fmt: skip
    assert token_maps.interleaved().tail == len(token_maps.interleaved())
    for same, classes in ((True, 24), (False, 39)):
        assert len(token_maps.two_videos(same).classes(Axis.FRAME)) == classes
