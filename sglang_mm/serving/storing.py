"""Media into the store: transformers' own image and video processors, asked for bytes instead of floats.

What they do to a picture before they make floats of it (turning to RGB, resizing, cutting into patches in the model's
order) stays theirs. What they do afterwards is one subtraction and one division per value, which a rank does for the
rows it encodes. A processor that does something else is found out, and its floats travel by value, as SGLang's do.
"""

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from sglang.srt.managers.schedule_batch import MultimodalInputFormat

from sglang_mm.config import Config
from sglang_mm.errors import SglangMMError
from sglang_mm.pixels import Lease, PatchStore, Scaling, StoredPatches
from sglang_mm.pixels.stored import PatchFile
from sglang_mm.pixels.wire import ANSWER_DEADLINE_S, LOOPBACK

logger = logging.getLogger(__name__)
BYTES = {"do_rescale": False, "do_normalize": False}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
LEASE = "sglang_mm_media"  # on SGLang's request object, which lives until the request has ended
LINGER_S = 5.0  # on one machine: a rank may hear of a request, and open its files, so much later than rank 0
PAIR = 2  # frames that a patch may span; a video is cut between such pairs

_store: PatchStore | None = None


def open_store(config: Config, host: str = LOOPBACK) -> PatchStore:
    """A store for the processors that are made from now on. host: how ranks find this machine.

    Where ranks run on several machines it answers on that address, and keeps files until the
    last rank must have read: rank 0 may tell of an end while others are still reading, but no rank waits for another
    longer than --deadline. Raises ConfigError.
    """
    global _store
    linger_s = LINGER_S if host == LOOPBACK else config.deadline_s + ANSWER_DEADLINE_S
    _store = PatchStore(config.media_dir, host, linger_s)
    if _store.removed:
        logger.info("removed pixels that killed servers left: %s", ", ".join(_store.removed))
    return _store


def in_use() -> PatchStore | None:
    """What was opened last and is not closed; without one pixels travel by value."""
    return _store if _store is not None and not _store.closed else None


@dataclass(frozen=True)
class StoredVideo:
    """One video at rest. grid: (pairs, rows, columns) of patches. frames: uint8 [n, 3, h, w] without data, from which a
    processor tells grid and times."""

    file: PatchFile
    scaling: Scaling
    grid: tuple[int, int, int]
    frames: torch.Tensor


@dataclass(frozen=True)
class Cut:
    """How a video can be processed in pieces. grid: of the whole. width: bytes of a patch."""

    grid: tuple[int, int, int]
    width: int
    scaling: Scaling


def frames_of(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 [count, 3, height, width] of shape alone."""
    return torch.empty(count, 3, height, width, dtype=torch.uint8, device="meta")


def cut_of(library, frames: torch.Tensor, settings: dict) -> Cut | None:
    """How to process a video in pieces so that they are those of the whole; None where that cannot be.

    library: transformers' video processor, which is asked with shapes alone. frames: as of frames_of.
    """
    whole, pair = (_processed(library, some, settings) for some in (frames, frames[:PAIR]))
    scaling = scaling_of(library, settings)
    (t, h, w), of_pair = whole["video_grid_thw"][0].tolist(), pair["video_grid_thw"][0].tolist()
    patches = whole[PIXELS["video"]]
    if scaling is None or of_pair != [1, h, w] or t != math.ceil(len(frames) / PAIR) or patches.dtype != torch.uint8:
        return None
    return Cut((t, h, w), patches.shape[1], scaling)


def store_video(library, pieces: Iterator[torch.Tensor], frames: torch.Tensor, cut: Cut, settings: dict, lease: Lease):
    """Process and write one piece after another. pieces: uint8 [n, 3, h, w], n even but for the last.

    Returns a StoredVideo. Raises NoRoom before the first piece is asked for, PixelsGone when the request has ended.
    """
    what = f"a video of {len(frames):,} frames of {frames.shape[3]}x{frames.shape[2]}"
    with lease.writer(math.prod(cut.grid), cut.width, what) as writer:
        for piece in pieces:
            writer.append(_processed(library, piece, settings)[PIXELS["video"]])
        return StoredVideo(writer.finish(), cut.scaling, cut.grid, frames)


def _processed(library, frames: torch.Tensor, settings: dict):
    return library.preprocess([frames], **{**settings, **BYTES, "return_tensors": "pt"})


class Swap:
    """Makes a processor whose pixels are numbers of stored rows, and handles of those numbers afterwards.

    The numbers pass through SGLang's own code, which bundles and splits pixels, as any tensor does.
    """

    def __init__(self, lease: Lease, videos: list[StoredVideo]):
        """videos: those of this request that are stored."""
        self._lease, self._videos = lease, videos
        self._stored: dict[str, StoredPatches] = {}

    def processor(self, library):
        """library: transformers' processor, for text and media together. It is not kept here: a ring of references
        would keep the lease until the garbage collector comes by."""
        twin = copy.copy(library)
        twin.image_processor = copy.copy(library.image_processor)
        twin.image_processor.preprocess = partial(self._images, library.image_processor)
        twin.video_processor = copy.copy(library.video_processor)
        twin.video_processor.preprocess = partial(self._frames, library.video_processor)
        return twin

    def handles_into(self, items: list) -> None:
        """Give SGLang's MultimodalDataItems handles, and their hashes, for the numbers of rows in them."""
        for item in items:
            kind, numbers = "video" if item.is_video() else "image", item.feature
            if item.format != MultimodalInputFormat.NORMAL or kind not in self._stored:
                continue
            if not (isinstance(numbers, torch.Tensor) and numbers.ndim == 1 and len(numbers)):
                raise SglangMMError(f"SGLang made a {type(numbers).__name__} of the numbers of a {kind}'s rows")
            item.feature = self._stored[kind].part(int(numbers[0]), int(numbers[-1]) + 1)
            item.hash = item.feature.hash

    def _images(self, library, images: list, **settings):
        """In the place of the image processor's preprocess."""
        scaling = scaling_of(library, settings)
        made = []
        for image in images if scaling else ():
            made.append(library.preprocess([image], **{**settings, **BYTES}))
            if made[-1]["pixel_values"].dtype != torch.uint8:
                scaling = None  # pictures of floats
                break
            made[-1]["pixel_values"] = self._written(made[-1]["pixel_values"], "an image")
        if scaling is None:
            return library.preprocess(images, **settings)
        grids = torch.cat([one["image_grid_thw"] for one in made])
        return self._numbered(made[-1], "image", [one["pixel_values"] for one in made], scaling, grids)

    def _frames(self, library, videos: list, **settings):
        """In the place of the video processor's preprocess: what is stored already, or frames that a client sent."""
        if not self._videos:
            return self._sent_frames(library, videos, settings)
        settings.pop("device", None)  # there is nothing to compute
        made = library.preprocess(videos, **{**settings, **BYTES})
        grids = torch.tensor([video.grid for video in self._videos])
        if not torch.equal(made["video_grid_thw"], grids):
            raise SglangMMError(f"video grids {grids.tolist()} were stored, {made['video_grid_thw'].tolist()} are due")
        return self._numbered(made, "video", [video.file for video in self._videos], self._videos[0].scaling, grids)

    def _sent_frames(self, library, videos: list, settings: dict):
        scaling = scaling_of(library, settings)
        made = library.preprocess(videos, **{**settings, **BYTES}) if scaling else {}
        if not made or made[PIXELS["video"]].dtype != torch.uint8:
            return library.preprocess(videos, **settings)
        file = self._written(made[PIXELS["video"]], "frames")
        return self._numbered(made, "video", [file], scaling, made["video_grid_thw"])

    def _written(self, patches: torch.Tensor, what: str) -> PatchFile:
        with self._lease.writer(*patches.shape, what) as writer:
            writer.append(patches)
            return writer.finish()

    def _numbered(self, made, kind: str, files: list[PatchFile], scaling: Scaling, grids: torch.Tensor):
        """made: transformers' answer, which gets row numbers in the place of pixels."""
        self._stored[kind] = StoredPatches.of(files, scaling)
        made[PIXELS[kind]], made[f"{kind}_grid_thw"] = torch.arange(len(self._stored[kind])), grids
        return made


def scaling_of(library, settings: dict) -> Scaling | None:
    """How one of transformers' processors makes floats of bytes; None where it is not as Scaling does it.

    settings: of the call, which have precedence over the processor's own.
    """

    def chosen(name: str):
        given = settings.get(name)
        return getattr(library, name, None) if given is None else given

    try:
        mean, std = tuple(map(float, chosen("image_mean"))), tuple(map(float, chosen("image_std")))
        scaling = Scaling(
            mean, std, float(chosen("rescale_factor")), bool(chosen("do_rescale")), bool(chosen("do_normalize"))
        )
        same = _is_librarys(library, scaling)
    except (TypeError, AttributeError) as error:
        same, scaling = False, error
    if not same:
        _tell_of_other_scaling(type(library).__name__, str(scaling))
    return scaling if same else None


def _is_librarys(library, scaling: Scaling) -> bool:
    """Whether both make the same floats, to the last bit, of all 256 bytes in each channel."""
    side, channels = 16, len(scaling.mean)
    every = torch.arange(side * side, dtype=torch.uint8).view(1, 1, side, side).repeat(1, channels, 1, 1)
    how = (scaling.rescale, scaling.factor, scaling.normalize, scaling.mean, scaling.std)
    expected = library.rescale_and_normalize(every, *how).float()
    return torch.equal(scaling.floats(every.view(1, -1)).view(every.shape), expected)


@cache
def _tell_of_other_scaling(library: str, scaling: str) -> None:
    logger.warning("%s scales pixels in a way of its own (%s): they travel by value, as floats", library, scaling)
