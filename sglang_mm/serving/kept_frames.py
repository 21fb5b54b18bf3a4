"""Frames that outlive a prefill chunk, so that a video is encoded once per request and not once per chunk.

A chunk encodes the frames its new rows touch. Only the frame that its end cuts is needed again; the rank that
encoded it keeps its embeddings, and every rank knows which rank that is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sglang_mm.types import Frame, FrameKey

ATTRIBUTE = "sglang_mm_kept"  # on SGLang's MultimodalInputs, which live as long as the request


@dataclass
class KeptFrames:
    """Of one request. holder: the rank of each kept frame, alike on all ranks. embeddings [frame.length, H]: this
    rank's own.
    """

    holder: dict[FrameKey, int] = field(default_factory=dict)
    embeddings: dict[FrameKey, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mm_inputs) -> "KeptFrames":
        """What earlier chunks kept; mm_inputs None: a request without media."""
        kept = getattr(mm_inputs, ATTRIBUTE, None)
        if kept is None:
            kept = cls()
            if mm_inputs is not None:
                setattr(mm_inputs, ATTRIBUTE, kept)
        return kept

    def renew(self, encoded: Sequence[Sequence[Frame]], mine: Mapping[FrameKey, Tensor], stop: int) -> None:
        """Keep the frames that position `stop`, the end of a chunk, cuts; let go of the others.

        encoded: per rank, the frames of this request that it has at hand. mine: the embeddings of this rank's.
        """
        cut = {frame.key: rank for rank, own in enumerate(encoded) for frame in own if frame.start < stop < frame.stop}
        self.holder = cut
        self.embeddings = {key: rows.clone() for key, rows in mine.items() if key in cut}
