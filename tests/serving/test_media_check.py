"""Media that clients prepared themselves: whatever does not fit together is refused, and what does passes."""

import pytest
import torch

from sglang_mm import Engine  # before SGLang: it decides then on which platform it is
from sglang_mm.serving.media_access import RequestError

MERGE, PATCH, HIDDEN, GRID = 2, 1176, 64, (2, 4, 6)
TOKENS, PATCHES, LENGTH = 12, 48, 20


@pytest.fixture(scope="module")
def sglang():
    assert Engine
    from sglang.srt.managers import schedule_batch

    return schedule_batch


@pytest.fixture
def prepared(sglang):
    """A video of 12 tokens at place 4 of a prompt of 20, as SGLang's processor leaves it."""
    item = sglang.MultimodalDataItem(
        modality=sglang.Modality.VIDEO,
        feature=torch.zeros(PATCHES, PATCH),
        offsets=[(4, 15)],
        format=sglang.MultimodalInputFormat.PROCESSOR_OUTPUT,
        model_specific_data={"video_grid_thw": torch.tensor([GRID])},
    )
    return sglang.MultimodalProcessorOutput(
        input_ids=[5] * LENGTH, mm_items=[item], padded_input_ids=[7] * LENGTH, mrope_positions=torch.zeros(3, LENGTH)
    )


def check(output, sent: bool = True) -> None:
    from sglang_mm.serving.media_check import check_prepared

    check_prepared(output, MERGE, PATCH, HIDDEN, sent=sent)


def test_what_fits_together_passes(prepared, sglang):
    check(prepared)
    (item,) = prepared.mm_items
    item.feature, item.format = torch.zeros(TOKENS, HIDDEN), sglang.MultimodalInputFormat.PRECOMPUTED_EMBEDDING
    check(prepared)
    item.feature, item.precomputed_embeddings = None, torch.zeros(TOKENS, HIDDEN)
    check(prepared)


def grid(*grids):
    return lambda item: item.model_specific_data.update(video_grid_thw=list(grids))


def data(values):
    return lambda item: setattr(item, "feature", values)


def places(*offsets):
    return lambda item: setattr(item, "offsets", list(offsets))


def embeddings(*shape):
    return lambda item: setattr(item, "precomputed_embeddings", torch.zeros(*shape))


WRONG = {
    "no grid": (lambda item: item.model_specific_data.clear(), "grid_thw is None"),
    "grid of words": (grid("a"), "grid_thw is "),
    "grid too large": (grid((2, 4, 8)), "12 tokens for a video of 16"),
    "grid of nothing": (grid((0, 4, 6)), "grid 0x4x6"),
    "negative grid": (grid((-2, -4, 6)), "grid -2x-4x6"),
    "grid of fractions": (grid((2.0, 4.0, 6.0)), "whole multiples"),
    "odd sides": (grid((2, 3, 8)), "grid 2x3x8"),
    "two grids": (grid(GRID, GRID), "1 video markers for 2 video grids"),
    "no marker": (places(), "0 video markers for 1 video grids"),
    "marker beyond the prompt": (places((10, 21)), "tokens 10 to 21 of a prompt of 20"),
    "marker before it": (places((-4, 7)), "tokens -4 to 7"),
    "too few pixels": (data(torch.zeros(PATCHES - 1, PATCH)), r"shape \(47, 1176\)"),
    "narrow pixels": (data(torch.zeros(PATCHES, PATCH // 2)), r"shape \(48, 588\)"),
    "flat pixels": (data(torch.zeros(PATCHES * PATCH)), "shape"),
    "pixels as numbers": (data([[0.0]]), "data that is a list"),
    "whole numbers": (data(torch.zeros(PATCHES, PATCH, dtype=torch.int64)), "int64"),
    "NaN": (lambda item: item.feature[3].fill_(float("nan")), "not finite"),
    "infinity": (lambda item: item.feature[3].fill_(float("inf")), "not finite"),
    "wide embeddings": (embeddings(TOKENS, HIDDEN + 1), r"shape \(12, 65\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(prepared, what):
    spoil, message = WRONG[what]
    spoil(prepared.mm_items[0])
    with pytest.raises(RequestError, match=f"{message}.*Allowed: .*Remedy: prepare both in one call"):
        check(prepared)


@pytest.mark.parametrize(
    ("field", "value"),
    [("padded_input_ids", [7] * 19), ("mrope_positions", torch.zeros(3, 19)), ("mrope_positions", torch.zeros(2, 20))],
)
def test_positions_and_ids_are_as_long_as_the_prompt(prepared, field, value):
    setattr(prepared, field, value)
    with pytest.raises(RequestError, match=f"{field} of .*for a prompt of 20"):
        check(prepared)


def test_overlapping_media_are_refused(prepared):
    import copy

    prepared.mm_items.append(copy.deepcopy(prepared.mm_items[0]))
    with pytest.raises(RequestError, match="a video at tokens 4 to 15"):
        check(prepared)


def test_an_image_between_two_videos_of_one_item_passes(prepared, sglang):
    """SGLang keeps all videos of a prompt in one item, wherever they are."""
    (videos,) = prepared.mm_items
    videos.model_specific_data = {"video_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]])}
    videos.offsets = [(1, 6), (12, 17)]
    image = sglang.MultimodalDataItem(
        modality=sglang.Modality.IMAGE,
        feature=torch.zeros(16, PATCH),
        offsets=[(8, 11)],
        format=sglang.MultimodalInputFormat.PROCESSOR_OUTPUT,
        model_specific_data={"image_grid_thw": torch.tensor([[1, 4, 4]])},
    )
    prepared.mm_items.append(image)
    check(prepared)
    videos.offsets = [(1, 6), (11, 16)]
    with pytest.raises(RequestError, match="a video at tokens 11 to 16"):
        check(prepared)


def test_pixels_that_sglang_made_are_not_searched(prepared):
    (item,) = prepared.mm_items
    item.format, item.feature = type(item.format).NORMAL, "a handle to another process's memory"
    check(prepared, sent=False)


def test_downloads_have_the_time_a_long_video_takes(monkeypatch):
    from sglang_mm.serving import media_check

    def asked(url: str, timeout: float) -> float:
        return timeout

    monkeypatch.delenv("REQUEST_TIMEOUT", raising=False)
    assert media_check.download(asked, "http://x", timeout=10) == 300
    monkeypatch.setenv("REQUEST_TIMEOUT", "7")
    assert media_check.download(asked, "http://x", timeout=7) == 7
