"""Floats that a rank makes of stored bytes are bit-equal to those that transformers makes; so are ids and positions."""

import gc

import numpy as np
import pytest
import torch

from sglang_mm.config import Config
from sglang_mm.pixels import PatchStore, StoredPatches
from sglang_mm.tiny import write_checkpoint, write_video
from tests.pixels.processing import picture, processed, processing, request, sent_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    return str(write_video(tmp_path_factory.mktemp("video") / "v.mp4", seconds=8, width=160, height=96))


def equal(make, store, ask) -> list:
    """Both ways of one request; the items of the stored one."""
    by_value, asked = processed(make(None), ask()), ask()
    stored = processed(make(store), asked)
    assert by_value.input_ids == stored.input_ids
    assert torch.equal(by_value.mrope_positions, stored.mrope_positions)
    for mine, theirs in zip(stored.mm_items, by_value.mm_items, strict=True):
        assert isinstance(mine.feature, StoredPatches) and mine.offsets == theirs.offsets
        assert torch.equal(mine.feature.all_pixels(at_once=100), theirs.feature)
        assert mine.model_specific_data.keys() == theirs.model_specific_data.keys()
    return [*stored.mm_items, asked]


@pytest.mark.parametrize("vision", ["frames", "stock"])
def test_bit_equal(checkpoint, video, tmp_path, vision):
    """Videos of files, of programs and of frames, of even and odd numbers; images of several sizes and kinds."""
    pictures = [picture(100, 200), picture(57, 91, "RGBA", 1), picture(300, 300, "L", 2), picture(900, 1100, seed=3)]
    frames = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), dtype=np.uint8)
    asks = [
        {"videos": [video]}, {"videos": [video, video]}, {"videos": [sent_video(3, 56, 84)]},
        {"videos": [sent_video(4, 30, 40)]}, {"videos": [frames]}, {"images": pictures},
        {"images": pictures[:1], "videos": [video]},
    ]  # fmt: skip
    with processing(checkpoint, vision) as make, PatchStore(tmp_path) as store:
        for ask in asks:
            equal(make, store, lambda ask=ask: request(**ask))


@pytest.mark.parametrize(
    "config",
    [
        {"image": {"do_normalize": False}, "video": {"do_normalize": False}},
        {"image": {"image_mean": [0.1, 0.2, 0.3]}, "video": {"image_std": [0.9, 0.8, 0.7]}},
        {"video": {"nframes": 5}},
    ],
    ids=str,
)
def test_bit_equal_with_settings_of_the_user(checkpoint, video, tmp_path, config):
    with processing(checkpoint, config=config) as make, PatchStore(tmp_path) as store:
        equal(make, store, lambda: request(images=[picture(100, 200)], videos=[video]))


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_pieces_are_those_of_the_whole(checkpoint, tmp_path, frames):
    from sglang_mm.serving import storing

    whole = torch.randint(0, 256, (frames, 3, 56, 84), dtype=torch.uint8)
    with processing(checkpoint) as make, PatchStore(tmp_path) as store:
        library, shape = make(None)._processor.video_processor, storing.frames_of(frames, 56, 84)
        lease, cut = store.lease(), storing.cut_of(library, shape, {})
        found = storing.store_video(library, iter(whole.split(2)), shape, cut, {}, lease)
        expected = library.preprocess([whole], return_tensors="pt")
        assert list(found.grid) == expected["video_grid_thw"][0].tolist()
        pixels = StoredPatches.of([found.file], found.scaling).all_pixels()
    assert torch.equal(pixels, expected["pixel_values_videos"])


def test_an_equal_picture_has_an_equal_hash_beside_others(checkpoint, tmp_path):
    with processing(checkpoint) as make, PatchStore(tmp_path) as store:
        processor, same = make(store), picture(100, 200)
        alone = processed(processor, request(images=[same])).mm_items
        beside = processed(processor, request(images=[picture(100, 200, seed=1), same])).mm_items
    assert alone[0].pad_values == beside[1].pad_values != beside[0].pad_values


def test_files_live_as_long_as_the_request(checkpoint, video, tmp_path):
    with processing(checkpoint) as make, PatchStore(tmp_path) as store:
        processor, asked = make(store), request(images=[picture(100, 200)], videos=[video])
        gc.disable()
        try:
            output = processed(processor, asked)
            assert len(store.files()) == 2
            del asked
            assert store.files() == [], "without the garbage collector, while handles are there"
            del output
        finally:
            gc.enable()


def test_a_refused_request_leaves_no_file(checkpoint, video, tmp_path):
    with processing(checkpoint) as make, PatchStore(tmp_path) as store:
        processor, asked = make(store), request(videos=[video, b"no video"])
        with pytest.raises(ValueError, match="Remedy"):
            processed(processor, asked)
        assert store.files() == []


@pytest.mark.parametrize(("turn", "by_reference"), [({}, True), ({"session_params": {"id": "s"}}, False)])
def test_turns_of_a_session_for_other_machines_travel_by_value(checkpoint, tmp_path, turn, by_reference):
    """Ranks there could not ask for what an ended turn showed; here they have it open."""
    with processing(checkpoint) as make, PatchStore(tmp_path, "127.0.0.2") as far, PatchStore(tmp_path) as near:
        for store, expected in ((far, by_reference), (near, True)):
            asked = request(images=[picture(100, 200)])
            vars(asked).update(turn)
            (item,) = processed(make(store), asked).mm_items
            assert isinstance(item.feature, StoredPatches) == expected


def test_how_long_files_linger(checkpoint, tmp_path):
    with processing(checkpoint):
        from sglang_mm.serving import storing

        config = Config(deadline_s=100, media_dir=str(tmp_path))
        for host, seconds in (("127.0.0.1", storing.LINGER_S), ("127.0.0.2", 160)):
            with storing.open_store(config, host) as store:
                assert store.linger_s == seconds and store.is_for_one_machine == (host == "127.0.0.1")


def test_a_full_disk_is_told_to_the_client(checkpoint, video, tmp_path, monkeypatch):
    from sglang_mm.pixels import writing

    monkeypatch.setattr(writing, "SPARE_BYTES", 1 << 60)
    told = r"a video of 16 frames of \d+x\d+, whose [\d,]+ patches take .*--media-dir"
    with processing(checkpoint) as make, PatchStore(tmp_path) as store, pytest.raises(ValueError, match=told):
        processed(make(store), request(videos=[video]))
