"""python -m tests.pixels.peak CHECKPOINT VIDEO FRAMES [PIECE_BYTES]: memory that reading takes.

Prints JSON: frames, stored bytes, and by how much the process grew at most while it decoded and stored them.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from tests.pixels.processing import processed, processing, request


def resident_bytes(name: str) -> int:
    """VmRSS: now; VmHWM: the most since `forget`."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget() -> None:
    """The most starts again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def main(checkpoint: str, video: str, frames: str, piece_bytes: str = "") -> None:
    from sglang_mm.pixels import PatchStore

    with processing(checkpoint, config={"video": {"nframes": int(frames)}}) as make:
        from sglang_mm.serving import sampling

        if piece_bytes:
            sampling.PIECE_BYTES = sampling.RESIZED_BYTES = int(piece_bytes)
        with tempfile.TemporaryDirectory() as parent, PatchStore(parent) as store:
            processor = make(store)
            forget()
            before = resident_bytes("VmRSS")
            asked = request(videos=[video])
            (item,) = processed(processor, asked).mm_items
            grown = resident_bytes("VmHWM") - before
            rows, width = item.feature.shape
            print(json.dumps({"frames": int(frames), "stored_bytes": rows * width, "grown_bytes": grown}))


if __name__ == "__main__":
    main(*sys.argv[1:])
