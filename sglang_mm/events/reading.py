"""The reading of one long medium, told while it goes on: events for who listens, and now and then a line in the log."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from sglang_mm.events.messages import MediaProgress
from sglang_mm.events.publishing import Publisher, publisher
from sglang_mm.events.wire import MEDIA_EVERY_S

logger = logging.getLogger(__name__)
LOG_EVERY_S = 10.0
T = TypeVar("T")


class Reading:
    """Use in a `with`: entering tells the start, leaving the end, also of a medium that could not be read.

    request: its id. medium: its number among the request's, from 0. frames: how many will be read.
    """

    def __init__(self, request: str, medium: int, frames: int, to: Publisher | None = None):
        self.publisher = publisher() if to is None else to
        self.request, self.medium, self.frames, self.done = request, medium, frames, 0

    def __enter__(self) -> "Reading":
        self._start = self._logged_at = time.monotonic()
        self._tell()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._logged_at > self._start:  # it was long enough to be spoken of
            logger.info("%s: %s", self, f"{kind.__name__}: {error}"[:500] if kind else "read")
        self._tell(ended=True, error=f"{kind.__name__}: {error}"[:500] if kind else "")

    def follow(self, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces, each of len(piece) frames, as they come; each counts once the next one is asked for."""
        for piece in pieces:
            yield piece
            self.done += len(piece)
            now = time.monotonic()
            if now - self._told_at >= MEDIA_EVERY_S:
                self._tell()
            if now - self._logged_at >= LOG_EVERY_S:
                self._logged_at = now
                left = (now - self._start) / max(1, self.done) * (self.frames - self.done)
                logger.info("%s: %.0f s so far, %.0f s left", self, now - self._start, left)

    def __str__(self) -> str:
        return f"request {self.request}, video {self.medium + 1}: {self.done:,} of {self.frames:,} frames"

    def _tell(self, ended: bool = False, error: str = "") -> None:
        self._told_at = time.monotonic()
        self.publisher.emit(
            MediaProgress(
                request=self.request,
                medium=self.medium,
                done=self.done,
                frames=self.frames,
                seconds=self._told_at - self._start,
                ended=ended,
                error=error,
            )
        )
