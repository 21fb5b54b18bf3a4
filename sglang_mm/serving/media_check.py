"""Media against the prompt and against each other, before a rank could fall over them."""

import os
import re

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalInputFormat
from sglang.srt.utils.common import CLIENT_MEDIA_EXCEPTIONS

from sglang_mm.pixels import NoRoom, PixelsGone, StoredPatches
from sglang_mm.serving.media_access import RequestError, a, shown

TIMEOUT = "REQUEST_TIMEOUT"  # SGLang's variable: seconds for one download
DOWNLOAD_S = 300  # without it, for what settings.py lets be downloaded; SGLang waits 10 s for a video, 3 s for an image
PADS = {Modality.IMAGE: "<|image_pad|>", Modality.VIDEO: "<|video_pad|>"}
PREPARED = "what the model's own processor makes of this prompt and its media"
PREPARE = "prepare both in one call"
ASPECT = "sides of at most 1 to 200"
DECODERS = {  # what decord, torchcodec, Pillow and SGLang say, and what it means
    r"(?i)Error reading|Invalid data found|Could not open input": "no video format, or cut off",
    r"(?i)cannot find video stream|no (valid |best )?(video )?streams?": "there is no video in it",
    r"broken metadata": "its frames cannot be counted",
    r"Error sending packet|Check failed|(?i:requested next frame)": "damaged: decoding breaks off",
    r"a play list": "a play list, which names other files",
    r"not enough values to unpack": "not base64: there is no comma",
    r"Non-base64 digit|Incorrect padding|base64": "not base64",
    r"cannot identify image file": "no image format",
}
SCRIPTS, SCRIPT_HEAD = (b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD", b"v=0"), 256  # files by which FFmpeg opens others
NETWORK = CLIENT_MEDIA_EXCEPTIONS[-1]  # what SGLang's downloads raise
SENT = (MultimodalInputFormat.PROCESSOR_OUTPUT, MultimodalInputFormat.PRECOMPUTED_EMBEDDING)


def download(original, url: str, timeout: float) -> bytes:
    """Around-hook on SGLang's download_remote_media: time for a long video. timeout: SGLang's, in seconds."""
    return original(url, timeout=_download_s())


def _download_s() -> float:
    return float(os.environ.get(TIMEOUT, DOWNLOAD_S))


def check_markers(text: str, tokens, media: dict[str, int]) -> None:
    """As many markers as media of each kind: SGLang drops what is too much, or waits for what is missing.

    tokens: the MultimodalSpecialTokens of SGLang's processor. media: how many of each kind. Raises RequestError.
    """
    parts = re.split(tokens.get_combined_regex(), text)
    found = [tokens.get_modality_of_token(part) for part in parts]
    for modality, pad in PADS.items():
        kind = modality.name.lower()
        stray = sum(part.count(pad) for part, of in zip(parts, found) if of is None)
        markers = found.count(modality) + stray
        if markers != media[kind]:
            raise RequestError(
                f"a prompt with {_count(markers, f'{kind} marker')} for {_count(media[kind], kind)}",
                f"one marker for each {kind}",
                f"write <|vision_start|>{pad}<|vision_end|> once for each {kind}, and nowhere else in the text",
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def unreadable(medium, kind: str, error: BaseException) -> BaseException:
    """What to raise for a medium that could not be loaded or decoded, and why."""
    if isinstance(error, RequestError | MemoryError | ImportError | NoRoom | PixelsGone):
        return error  # not the client's doing, or told already
    said, allowed, remedy = _in_words(error), f"{a(kind)} that can be decoded", "check the file, or encode it again"
    if isinstance(error, NETWORK) and "Timeout" in type(error).__name__:
        said, allowed = "not downloaded in time", f"downloads within {_download_s():g} s"
        remedy = f"raise the server's variable {TIMEOUT}"
    elif isinstance(error, NETWORK):
        said, allowed, remedy = _reason(error), "an address that the server can reach", "check the address"
    elif isinstance(error, TimeoutError):
        said, allowed, remedy = "not decoded in time", "decoding within --deadline", "raise --deadline, or send less"
    elif "download limit" in said:
        allowed, remedy = "downloads up to that size", "raise the server's --media-url-max-file-size-mb"
    elif "domain is not allowed" in said:
        allowed, remedy = "hosts named by --allowed-media-domains", "have it added, or send the file itself"
    elif "base64" in said:
        allowed, remedy = "data:TYPE;base64,... or base64 alone", "encode the file's bytes with base64"
    elif "aspect ratio" in said:
        allowed, remedy = ASPECT, "crop it, or cut it in parts"
    return RequestError(f"{kind} {shown(medium)} ({said})", allowed, remedy)


def _in_words(error: BaseException) -> str:
    """The decoder's reason, without addresses in memory, times and paths of its sources."""
    text = str(error)
    for pattern, words in DECODERS.items():
        if re.search(pattern, text):
            return words
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"^Could not decode \w+: | ?<_io\.BytesIO object at \w+>|\.+$", "", first).strip()


def _reason(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return f"status {response.status_code}" if response is not None else type(error).__name__


def check_prepared(output, merge: int, patch: int, hidden: int, *, sent: bool) -> None:
    """Grids, places in the prompt, data and positions agree. output: SGLang's MultimodalProcessorOutput.

    merge: spatial merge size. patch: values of one patch. hidden: those of one embedding. sent: whether clients made
    any of it themselves; then the numbers are looked at, too. Raises RequestError naming the first disagreement.
    """
    length, media = len(output.input_ids), []
    for item in output.mm_items:
        kind = _kind(item)
        grids = _grids(item, kind, merge)
        if len(grids) != len(item.offsets or ()):
            raise _disagree(f"{len(item.offsets or ())} {kind} markers for {len(grids)} {kind} grids")
        media += [(*place, kind, *grid) for place, grid in zip(sorted(item.offsets), grids)]
    _check_places(sorted(media), length, merge)
    for item in output.mm_items:
        if item.format in SENT or sent:
            patches = sum(t * h * w for t, h, w in _grids(item, _kind(item), merge))
            _check_data(item, _kind(item), (patches, patch), (patches // merge**2, hidden))
    padded = output.padded_input_ids
    if padded is not None and len(padded) != length:
        raise _disagree(f"padded_input_ids of {len(padded)} tokens for a prompt of {length}")
    if output.mrope_positions is not None and tuple(output.mrope_positions.shape) != (3, length):
        raise _disagree(f"mrope_positions of shape {tuple(output.mrope_positions.shape)} for a prompt of {length}")


def _check_places(media: list[tuple], length: int, merge: int) -> None:
    """media: (first token, last token, kind, frames, rows, columns), in order: those of one item may lie apart."""
    end = -1
    for first, last, kind, t, h, w in media:
        if not end < first <= last < length:
            raise _disagree(f"a {kind} at tokens {first} to {last} of a prompt of {length}")
        if last - first + 1 != t * h * w // merge**2:
            raise _disagree(f"{last - first + 1} tokens for a {kind} of {t * h * w // merge**2} (grid {t}x{h}x{w})")
        end = last


def _kind(item) -> str:
    return "video" if item.is_video() else "image"


def _grids(item, kind: str, merge: int) -> list[list[int]]:
    grid = item.model_specific_data.get(f"{kind}_grid_thw")
    try:
        grids = torch.as_tensor(grid).reshape(-1, 3).tolist()
    except (TypeError, ValueError, RuntimeError):
        raise _disagree(f"a {kind} whose {kind}_grid_thw is {grid!r}") from None
    for t, h, w in grids:
        if not all(isinstance(side, int) for side in (t, h, w)) or min(t, h, w) < 1 or h % merge or w % merge:
            raise _disagree(f"a {kind} grid {t}x{h}x{w} whose sides are not whole multiples of {merge}")
    return grids


def _check_data(item, kind: str, pixels: tuple[int, int], embeddings: tuple[int, int]) -> None:
    """A finite float tensor of the shape of pixels, or of embeddings where the client made those."""
    embedded = item.precomputed_embeddings is not None or item.format == MultimodalInputFormat.PRECOMPUTED_EMBEDDING
    rows = item.precomputed_embeddings if item.precomputed_embeddings is not None else item.feature
    stored = isinstance(rows, StoredPatches)  # the server's own, which stands for floats
    if not stored and not (isinstance(rows, torch.Tensor) and rows.is_floating_point()):
        raise _disagree(f"{kind} data that is a {getattr(rows, 'dtype', type(rows).__name__)}")
    expected = embeddings if embedded else pixels
    if tuple(rows.shape) != expected:
        raise _disagree(f"{kind} data of shape {tuple(rows.shape)} where {expected} is due")
    if not stored and not torch.isfinite(rows).all():
        raise _disagree(f"{kind} data with values that are not finite")


def _disagree(given: str) -> RequestError:
    return RequestError(given, PREPARED, PREPARE)


def open_video(original, wrapper, source, *args, **kwargs):
    """Around-hook on SGLang's VideoDecoderWrapper.__init__: play lists are no videos, they name other files."""
    if isinstance(source, bytes | bytearray):
        head = bytes(source[:SCRIPT_HEAD])
    elif isinstance(source, str | os.PathLike) and os.path.isfile(source):
        with open(source, "rb") as file:
            head = file.read(SCRIPT_HEAD)
    else:
        head = b""
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(SCRIPTS):
        raise RequestError("a video that is a play list", "the video itself", "send the files that it names")
    return original(wrapper, source, *args, **kwargs)
