"""Cutting prompts into runs and frames: exact tilings, whatever a cached prefix or a chunk cuts through."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mm.errors import SglangMMError
from sglang_mm.modality import MediaSpan, frames_of, runs_of


def build(parts: list[tuple[int, int, int]]) -> tuple[list[MediaSpan], int]:
    """Spans from (text before, frames, tokens per frame) each, and the prompt's length."""
    spans, at = [], 0
    for item, (text, frames, length) in enumerate(parts):
        spans.append(MediaSpan(item, at + text, frames * length, frames, "video" if frames > 1 else "image"))
        at += text + frames * length
    return spans, at + 5


prompts = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 7)), max_size=5).map(build)


@given(prompts, st.data())
def test_runs_tile_and_keep_to_their_media(prompt, data):
    spans, length = prompt
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    runs = runs_of(spans, start, stop)
    assert runs[0].start == start and runs[-1].stop == stop
    assert all(run.stop == following.start for run, following in pairwise(runs))
    for run in runs:
        inside = [span for span in spans if span.start < run.stop and run.start < span.stop]
        if run.modality == "text":
            assert not inside
        else:
            (span,) = inside
            assert span.start <= run.start and run.stop <= span.stop and span.modality == run.modality
            if run.frames > 1:
                assert run.length == run.frames * span.frame_length
                assert (run.start - span.start) % span.frame_length == 0


@given(prompts)
def test_whole_media_are_one_run_each(prompt):
    spans, length = prompt
    media = [run for run in runs_of(spans, 0, length) if run.modality != "text"]
    assert [(run.start, run.length, run.frames) for run in media] == [(s.start, s.length, s.frames) for s in spans]


@given(prompts)
def test_frames_tile_their_spans(prompt):
    spans, _ = prompt
    frames = iter(frames_of(spans))
    for span in spans:
        own = [next(frames) for _ in range(span.frames)]
        assert [frame.index for frame in own] == list(range(span.frames))
        assert own[0].start == span.start and own[-1].stop == span.stop
        assert all(frame.stop == following.start for frame, following in pairwise(own))
    assert next(frames, None) is None


def test_a_video_cut_inside_frames_is_ragged_whole_ragged():
    """Frames of 4 tokens at 10, 14, 18, 22; a chunk from 12 to 25."""
    runs = runs_of([MediaSpan(0, 10, 16, 4, "video")], 12, 25)
    assert [(run.start, run.length, run.frames) for run in runs] == [(12, 2, 1), (14, 8, 2), (22, 3, 1)]


@pytest.mark.parametrize(("length", "frames"), [(0, 1), (7, 2), (4, 0)])
def test_impossible_spans(length, frames):
    with pytest.raises(SglangMMError, match="Allowed"):
        MediaSpan(0, 0, length, frames, "video")
