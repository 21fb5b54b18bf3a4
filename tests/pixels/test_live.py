"""Pixels in a living engine: one rank reads files, the other asks the store; all are gone with their requests."""

import pytest

from sglang_mm.tiny import write_checkpoint, write_video
from tests.pixels.live import CHUNK
from tests.serving import compare
from tests.serving.engine_process import engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    there = tmp_path_factory.mktemp("live")
    checkpoint, media = str(write_checkpoint(there / "tiny")), there / "media"
    video = str(write_video(there / "v.mp4", seconds=8))
    media.mkdir()
    arguments = {
        "model_path": checkpoint, "cp": 2, "cp_min_tokens": 8, "chunked_prefill_size": CHUNK, "media_dir": str(media),
        "max_running_requests": 1, "max_total_tokens": 16_000,
    }  # fmt: skip
    with engine("tests.pixels.live:HalfElsewhere", **arguments) as ask:
        during = [path.name for path in media.iterdir()]
        found = ask("tests.pixels.live:all_questions", video)
    return {**found, "during": during, "after": list(media.iterdir())}


def test_by_reference_and_by_value(told):
    ways = told["by_both_ways"]
    reference, value = ways["reference"], ways["value"]
    assert ways["asked"] > 0, "the second rank read its frames through the store"
    assert reference["output_ids"] == value["output_ids"]
    assert compare.largest_difference(reference, value) <= compare.TOLERANCE
    assert sum(frames > 0 for frames in compare.record_of(reference)["frames_encoded"]) == 2, "both ranks read"


def test_several_answers_and_batches(told):
    assert len(told["several"]["answers"]) == 2 and len(set(map(tuple, told["several"]["answers"]))) == 1
    assert len(told["batch"]["answers"]) == 2 and told["batch"]["files"] >= 3
    assert told["several"]["asked"] > 0 and told["batch"]["asked"] > 0


def test_refused_when_its_frames_were_written(told):
    assert "Remedy" in told["refused"]["error"] and told["refused"]["written"] == 1
    assert not told["refused"]["left"], "no rank has heard of them: nothing lingers"


def test_an_abort_between_chunks(told):
    aborted = told["aborted_between_chunks"]
    assert aborted["ended"]["type"] == "abort" and aborted["chunk"] == 1 and aborted["answer"] == []


def test_an_abort_in_the_queue(told):
    waiting, running = told["aborted_in_the_queue"]["ends"]
    assert waiting["type"] == running["type"] == "abort" and "queue" in waiting["message"]
    after, before = told["aborted_in_the_queue"]["after"], told["by_both_ways"]["reference"]
    assert after["output_ids"] == before["output_ids"], "the server goes on"


@pytest.mark.parametrize(
    "what", ["by_both_ways", "several", "batch", "refused", "aborted_between_chunks", "aborted_in_the_queue"]
)
def test_leases_end_with_their_requests(told, what):
    assert told[what]["leases"] == 0


def test_no_file_and_no_directory_stays(told):
    assert told["leases"] >= 9 and told["files"] == []
    assert len(told["during"]) == 1 and told["after"] == []
