"""Where the images and videos of one prompt lie, cut into runs (for the layout) and frames (for the vision tower).

prompt   t t t V V V V V V V V V t t I I I I t t        t text, V video of 3 frames, I image
spans          [---- t=3 -----]     [ t=1 ]
runs     [ 0 ][      1        ][ 2 ][  3  ][4]
frames         [ 0 ][ 1 ][ 2 ]      [  3  ]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_mm.errors import SglangMMError
from sglang_mm.types import Frame, Run


@dataclass(frozen=True)
class MediaSpan:
    """One image or video: tokens [start, start + length) of the prompt, `frames` frames of equal length.

    item: index of the media in the prompt. modality: "image" or "video".
    """

    item: int
    start: int
    length: int
    frames: int
    modality: str

    def __post_init__(self):
        if self.length < 1 or self.frames < 1 or self.length % self.frames:
            raise SglangMMError(
                f"{self.modality} {self.item} has {self.length} tokens in {self.frames} frames. Allowed: the same "
                "number of tokens in every frame. Remedy: check the grid that the processor reported."
            )

    @property
    def frame_length(self) -> int:
        return self.length // self.frames

    @property
    def stop(self) -> int:
        return self.start + self.length


def frames_of(spans: Sequence[MediaSpan]) -> list[Frame]:
    """Every frame of every media item, in prompt order."""
    return [
        Frame(item=span.item, index=i, start=span.start + i * span.frame_length, length=span.frame_length)
        for span in spans
        for i in range(span.frames)
    ]


def runs_of(spans: Sequence[MediaSpan], start: int, stop: int) -> list[Run]:
    """Cut positions [start, stop) of a prompt into text, image and video runs that tile it exactly.

    spans: in prompt order, not overlapping. A video cut in the middle of a frame by `start` or `stop` (a cached
    prefix, a prefill chunk) becomes a ragged run, a run of whole frames, and a ragged run.
    """
    runs, at = [], start
    for span in spans:
        low, high = max(span.start, start), min(span.stop, stop)
        if low >= high:
            continue
        if low > at:
            runs.append(Run(at, low - at))
        runs.extend(_media_runs(span, low, high))
        at = high
    if at < stop:
        runs.append(Run(at, stop - at))
    return runs


def _media_runs(span: MediaSpan, low: int, high: int) -> Iterator[Run]:
    """[low, high) of one span: a partial first frame, whole frames, a partial last frame."""
    n = span.frame_length
    first = min(span.start + -(-(low - span.start) // n) * n, high)
    last = max(span.start + (high - span.start) // n * n, first)
    if first > low:
        yield Run(low, first - low, 1, span.modality)
    if last > first:
        yield Run(first, last - first, (last - first) // n, span.modality)
    if high > last:
        yield Run(last, high - last, 1, span.modality)
