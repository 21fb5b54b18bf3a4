"""A frame that a chunk's end cuts is encoded once: kept by the rank that encoded it, sent again by the same rank."""

from itertools import pairwise
from types import SimpleNamespace

import torch

from sglang_mm.parallel.layout import make_layout
from sglang_mm.parallel.vision import plan_exchange
from sglang_mm.serving.kept_frames import KeptFrames
from sglang_mm.types import BatchLayout, Frame, Run

RANKS, LENGTH, COUNT = 3, 10, 30
FRAMES = [Frame(0, i, 5 + i * LENGTH, LENGTH) for i in range(COUNT)]
END = 5 + COUNT * LENGTH


def encode_chunk(kept: list[KeptFrames], start: int, stop: int) -> list[int]:
    """One chunk on every rank; which frames met the vision tower."""
    layout = BatchLayout((make_layout([Run(start, stop - start)], RANKS),))
    (holder,) = {str(own.holder): own.holder for own in kept}.values()
    exchange = plan_exchange([FRAMES], layout, [holder])
    encoded = []
    for rank, own in enumerate(kept):
        at_hand = {frame.key: own.embeddings.get(frame.key) for _, frame in exchange.encode[rank]}
        assert {key for key, rows in at_hand.items() if rows is not None} == {
            frame.key for _, frame in exchange.encode[rank] if frame.key in holder
        }
        encoded += [index for (_, index), rows in at_hand.items() if rows is None]
        mine = {frame.key: torch.full((LENGTH, 2), float(frame.index)) for _, frame in exchange.encode[rank]}
        own.renew([[frame for _, frame in pairs] for pairs in exchange.encode], mine, stop)
    return encoded


def test_every_frame_meets_the_tower_once_whatever_the_chunks():
    for size in (7, 10, 23, 64, END):
        kept = [KeptFrames() for _ in range(RANKS)]
        cuts = [*range(0, END, size), END]
        encoded = [frame for start, stop in pairwise(cuts) for frame in encode_chunk(kept, start, stop)]
        assert sorted(encoded) == list(range(COUNT)), size
        assert not any(own.holder or own.embeddings for own in kept), "nothing is kept after the last chunk"


def test_without_keeping_cut_frames_are_encoded_again():
    encoded = []
    for start in range(0, END - 23, 23):
        encoded += encode_chunk([KeptFrames() for _ in range(RANKS)], start, start + 23)
    assert len(encoded) > len(set(encoded))


def test_one_rank_keeps_the_embeddings_and_all_know_it():
    kept = [KeptFrames() for _ in range(RANKS)]
    encode_chunk(kept, 0, 99)
    assert [own.holder for own in kept] == [kept[0].holder] * RANKS and list(kept[0].holder) == [(0, 9)]
    (holder,) = [rank for rank, own in enumerate(kept) if own.embeddings]
    assert kept[0].holder == {(0, 9): holder}
    assert torch.equal(kept[holder].embeddings[0, 9], torch.full((LENGTH, 2), 9.0))


def test_they_live_as_long_as_the_request():
    mm_inputs = SimpleNamespace()
    kept = KeptFrames.of(mm_inputs)
    kept.holder[0, 1] = 2
    assert KeptFrames.of(mm_inputs) is kept
    assert KeptFrames.of(None).holder == KeptFrames.of(SimpleNamespace()).holder == {}
