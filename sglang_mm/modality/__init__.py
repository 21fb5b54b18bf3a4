"""From token ids and grids to what each token is. Pure integers; knows no ranks, kernels or sglang."""

from sglang_mm.modality.media import MediaSpan, frames_of, runs_of

__all__ = ["MediaSpan", "frames_of", "runs_of"]
