"""Writing one medium, piece by piece, into room that was made for all of it before."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from uuid import uuid4

import torch

from sglang_mm.errors import SglangMMError
from sglang_mm.pixels.stored import PatchFile
from sglang_mm.pixels.wire import Home, NoRoom

DIGEST_BYTES = 16
SPARE_BYTES = 64 << 20  # left to others on the same disk
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PatchWriter:
    """A file of `rows` rows of `width` bytes, hashed while it is written. Use it in a `with`, then `finish`.

    Raises NoRoom when the disk cannot hold it, PixelsGone when its request has ended meanwhile.
    """

    def __init__(self, directory: Path, home: Home, rows: int, width: int, what: str, files):
        """files: what deletes the file with its lease."""
        self.name, self.rows, self.width, self.written = uuid4().hex, rows, width, 0
        self._home, self._files, self._what, self._directory = home, files, what, directory
        self._hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
        files.add(self.name)
        if shutil.disk_usage(directory).free < rows * width + SPARE_BYTES:
            raise self._no_room()
        self._open_file = os.open(directory / self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._open_file, 0, rows * width)
        except OSError as error:
            self.__exit__()
            if error.errno in FULL:
                raise self._no_room() from None
            raise

    def append(self, patches: torch.Tensor) -> None:
        """uint8 [n, width]: the next rows."""
        self._files.check()
        patches = patches.cpu().contiguous()
        if patches.dtype != torch.uint8 or patches.ndim != 2 or patches.shape[1] != self.width:
            raise SglangMMError(
                f"{patches.dtype} patches of shape {tuple(patches.shape)} for rows of {self.width} bytes"
            )
        data = memoryview(patches.numpy()).cast("B")
        self._hashed.update(data)
        while data:
            data = data[os.write(self._open_file, data) :]
        self.written += len(patches)

    def finish(self) -> PatchFile:
        """The handle to the whole. Raises PixelsGone when rows are missing, or too many."""
        if self.written != self.rows:
            raise SglangMMError(f"{self.written} rows were written where {self.rows} are due")
        self.__exit__()
        return PatchFile(self.name, self.rows, self.width, self._hashed.hexdigest(), self._home)

    def _no_room(self) -> NoRoom:
        free = max(0, shutil.disk_usage(self._directory).free - SPARE_BYTES)
        return NoRoom(
            f"{self._what}, whose {self.rows:,} patches take {self.rows * self.width:,} bytes",
            f"{free:,} bytes, which are free in {self._directory.parent}",
            "send less of it or wait for other requests; the server's --media-dir can name a larger disk",
        )

    def __enter__(self) -> "PatchWriter":
        return self

    def __exit__(self, *_) -> None:
        opened, self._open_file = self._open_file, None
        if opened is not None:
            os.close(opened)
