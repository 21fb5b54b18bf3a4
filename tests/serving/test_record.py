"""Records of prompts that come in chunks are joined; others are left as they are."""

from types import SimpleNamespace

import pytest

from sglang_mm.serving.record import REMEMBERED, ChunkLog, note_chunks, stock_records
from sglang_mm.serving.sight import tokens_by_modality


def batch(*requests: tuple[str, int, int]):
    """requests: (id, cached tokens, new tokens)"""
    rids, prefixes, lengths = map(list, zip(*requests))
    return SimpleNamespace(
        rids=rids,
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=lengths,
        mm_inputs=None,
        batch_size=len(requests),
    )


@pytest.fixture(autouse=True)
def unfinished():
    """Every prompt goes on, until a test says otherwise."""
    going_on(*map(str, range(2 * REMEMBERED)), "a", "b")
    yield
    going_on()


def going_on(*rids: str) -> None:
    mode = SimpleNamespace(is_extend_without_speculative=lambda: True)
    reqs = [SimpleNamespace(rid=rid, extend_end=5, full_untruncated_fill_ids=range(9)) for rid in rids]
    note_chunks(SimpleNamespace(forward_mode=mode), None, SimpleNamespace(reqs=reqs), None)


def sharded(new: int, cached: int, seconds: float) -> dict:
    return {
        "schedule": "ring", "ranks": 2, "rows_per_rank": [new // 2, new - new // 2], "new_tokens": new,
        "cached_tokens": cached, "tokens": {"text": 1, "video": new - 1}, "chunks": 1, "batch": 1,
        "frames_encoded": [1, 2], "bytes_sent": {"kv": [10, 20]}, "seconds": {"attention": [seconds, 2 * seconds]},
        "predicted_seconds": {"ring": 0.1}, "fallbacks": [],
    }  # fmt: skip


def test_chunks_add_up():
    log = ChunkLog()
    first, last = batch(("a", 8, 100)), batch(("a", 108, 51))
    assert log.chunks_before(first) == 0
    log.join(first, [sharded(100, 8, 0.25)])
    assert log.chunks_before(last) == 1
    (joined,) = log.join(last, [sharded(51, 108, 0.5)])
    assert joined == {
        "schedule": "ring", "ranks": 2, "rows_per_rank": [75, 76], "new_tokens": 151, "cached_tokens": 8,
        "tokens": {"text": 2, "video": 149}, "chunks": 2, "batch": 1, "frames_encoded": [2, 4],
        "bytes_sent": {"kv": [20, 40]}, "seconds": {"attention": [0.75, 1.5]}, "predicted_seconds": {"ring": 0.2},
        "fallbacks": [],
    }  # fmt: skip


def test_a_last_chunk_on_the_stock_path_shows():
    log = ChunkLog()
    log.join(batch(("a", 0, 100)), [sharded(100, 0, 0.25)])
    last = batch(("a", 100, 3))
    (joined,) = log.join(last, stock_records(last, 2, "fewer new tokens than ranks"))
    assert joined["schedule"] == "ring+stock" and joined["fallbacks"] == ["fewer new tokens than ranks"]
    assert joined["rows_per_rank"] == [53, 53] and joined["new_tokens"] == 103 and joined["frames_encoded"] == [1, 2]


def test_another_request_or_another_turn_is_not_joined():
    log = ChunkLog()
    log.join(batch(("a", 0, 100)), [sharded(100, 0, 0.25)])
    for following in (batch(("b", 100, 50)), batch(("a", 107, 50)), batch(("a", 0, 50))):
        record = sharded(50, following.extend_prefix_lens_cpu[0], 0.5)
        assert log.join(following, [record]) == [record]


def test_a_request_that_is_prefilled_again_begins_anew():
    """After a retraction SGLang finds the prompt in the cache, to its very end."""
    log = ChunkLog()
    going_on()
    log.join(batch(("a", 0, 100)), [sharded(100, 0, 0.25)])
    record = sharded(6, 100, 0.5)
    assert log.chunks_before(batch(("a", 100, 6))) == 0
    assert log.join(batch(("a", 100, 6)), [record]) == [record]


def test_what_is_remembered_is_bounded():
    log = ChunkLog()
    for i in range(2 * REMEMBERED):
        log.join(batch((str(i), 0, 9)), [sharded(9, 0, 0.1)])
    assert len(log._last) == REMEMBERED


def test_tokens_by_modality():
    video = SimpleNamespace(is_video=lambda: True, offsets=[(10, 29)])
    images = SimpleNamespace(is_video=lambda: False, offsets=[(40, 43), (50, 50)])
    prompt = SimpleNamespace(mm_items=[video, images])
    assert tokens_by_modality(prompt, 0, 60) == {"text": 35, "image": 5, "video": 20}
    assert tokens_by_modality(prompt, 20, 42) == {"text": 10, "image": 2, "video": 10}
    assert tokens_by_modality(None, 3, 9) == {"text": 6, "image": 0, "video": 0}
