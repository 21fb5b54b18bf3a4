"""Patches at rest: bytes in files of the server's own, handles that name them, floats made where they are needed."""

from sglang_mm.pixels.scaling import Scaling
from sglang_mm.pixels.store import Lease, PatchStore
from sglang_mm.pixels.stored import StoredPatches
from sglang_mm.pixels.wire import DIRECTORY, NoRoom, PixelsGone

__all__ = ["DIRECTORY", "Lease", "NoRoom", "PatchStore", "PixelsGone", "Scaling", "StoredPatches"]
