"""A handle to stored patches: small, picklable, and readable in any process of the server."""

import os
import weakref
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from sglang_mm.pixels import asking
from sglang_mm.pixels.scaling import Scaling
from sglang_mm.pixels.wire import DIRECTORY, Home, PixelsGone, is_name, machine
from sglang_mm.types import digest64


class PatchFile:
    """One medium at rest: `rows` rows of `width` bytes. digest: of its bytes.

    It is opened where it is unpickled, so that it can be read there for as long as the handle lives, even when the file
    has been deleted since. A process that has no such file asks the store for the rows it reads.
    """

    def __init__(self, name: str, rows: int, width: int, digest: str, home: Home):
        if not is_name(name):
            raise PixelsGone(f"pixels named {str(name)[:40]!r}: a store names files by 32 hexadecimal digits")
        self.name, self.rows, self.width, self.digest, self.home = name, rows, width, digest, home
        self._open_file: int | None = None
        self._open()

    def __reduce__(self):
        return PatchFile, (self.name, self.rows, self.width, self.digest, self.home)

    def __copy__(self) -> "PatchFile":
        return self

    def __deepcopy__(self, _) -> "PatchFile":
        return self  # a new one would have to open a file that may be gone

    def _open(self) -> None:
        directory = os.environ.get(DIRECTORY)
        if directory is None or self.home.machine != machine():
            return
        try:
            opened = os.open(os.path.join(directory, self.name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # of no consequence unless it is read
            return
        self._open_file = opened
        weakref.finalize(self, os.close, opened)

    def read(self, first: int, last: int, into: torch.Tensor) -> None:
        """Rows [first, last) into `into`, uint8 [last - first, width] on the host. Raises PixelsGone."""
        if self._open_file is None:
            self._open()
        buffer = memoryview(into.numpy()).cast("B")
        if self._open_file is None:
            asking.read(self.home.address, self.name, first, last, self.width, buffer)
            return
        done = 0
        while done < len(buffer):
            count = os.preadv(self._open_file, [buffer[done:]], first * self.width + done)
            if not count:
                raise PixelsGone(f"pixels {self.name} end before row {last}: did another process write there?")
            done += count


@dataclass(frozen=True)
class StoredPatches:
    """Rows [first, first + count) of media that lie one behind the other.

    files: the media. scaling: how their bytes become floats.
    """

    files: tuple[PatchFile, ...]
    scaling: Scaling
    first: int
    count: int
    _starts: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_starts", (0, *accumulate(file.rows for file in self.files)))
        if not (self.files and self.first >= 0 and self.first + self.count <= self._starts[-1]):
            raise PixelsGone(f"rows {self.first} to {self.first + self.count} of {self._starts[-1]} stored ones")
        if len({file.width for file in self.files}) > 1:
            raise PixelsGone(f"patches of {sorted({file.width for file in self.files})} bytes in one handle")

    def __reduce__(self):
        return StoredPatches, (self.files, self.scaling, self.first, self.count)

    @classmethod
    def of(cls, files: list[PatchFile], scaling: Scaling) -> "StoredPatches":
        """All rows of some files."""
        return cls(tuple(files), scaling, 0, sum(file.rows for file in files))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and values of a row, as of the float tensor they stand for."""
        return self.count, self.files[0].width

    @property
    def hash(self) -> int:
        """64 bits that tell these pixels from others."""
        parts = [(file.digest, low, high) for file, low, high in self._parts(0, self.count)]
        return digest64([parts, self.shape, self.scaling])

    def __len__(self) -> int:
        return self.count

    def part(self, first: int, last: int) -> "StoredPatches":
        """A handle to rows [first, last) of these; files that hold none of them are left out."""
        kept = list(self._parts(first, last))
        if not kept:
            raise PixelsGone(f"rows {first} to {last} of {self.count} stored ones")
        return StoredPatches(tuple(file for file, _, _ in kept), self.scaling, kept[0][1], last - first)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """uint8 [last - first, width], read now. Raises PixelsGone."""
        found, at = torch.empty(last - first, self.shape[1], dtype=torch.uint8), 0
        for file, low, high in self._parts(first, last):
            file.read(low, high, found[at : at + high - low])
            at += high - low
        if at != last - first:
            raise PixelsGone(f"rows {first} to {last} of {self.count} stored ones")
        return found

    def pixels(self, first: int, last: int, device=None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Floats [last - first, width] of those rows, made on `device`: float32 unless told another dtype."""
        return self.scaling.floats(self.rows(first, last).to(device)).to(dtype or torch.float32)

    def all_pixels(self, device=None, dtype: torch.dtype | None = None, at_once: int = 16384) -> torch.Tensor:
        """Floats of all rows; beside them never more than `at_once` rows of another kind are there."""
        whole = torch.empty(self.shape, device=device, dtype=dtype or torch.float32)
        for low in range(0, self.count, at_once):
            high = min(low + at_once, self.count)
            whole[low:high] = self.pixels(low, high, device)
        return whole

    def to(self, *_, **__) -> "StoredPatches":
        """Itself: SGLang moves features between devices, these stay where they are until they are read."""
        return self

    def _parts(self, first: int, last: int):
        """(file, its first row, its last row) of rows [first, last) of these."""
        low, high = self.first + first, self.first + last
        for file, start in zip(self.files, self._starts):
            begin, end = max(low, start), min(high, start + file.rows)
            if begin < end:
                yield file, begin - start, end - start
