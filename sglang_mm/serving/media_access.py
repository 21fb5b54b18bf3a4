"""Whose files may be read: media that a request names by path.

SGLang opens any path a client writes into `image_url`, `video_url` or `image_data`. Here each name is looked at once,
before it is loaded, and rewritten so that SGLang's loaders can take it for one thing only:

    http(s) addresses     as they are: SGLang's --allowed-media-domains decides
    data: addresses       as they are
    file:// and paths     file:// of the real path below an allowed directory, symbolic links followed; else refused
    bare base64           a data: address (SGLang takes a JPEG's base64, which begins with /9j/, for a path)

Whether a file outside exists is not told: it is refused in the same words.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote, unquote, urlsplit

from sglang_mm.errors import ConfigError

REMOTE, INLINE, SENT = ("http://", "https://"), "data:", "video:"  # `video:` is sgl.video, see frontend.py
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}")
JPEG = "/9j/"  # what the base64 of every JPEG begins with; no other image or video has base64 that begins with /
SHORTEST_INLINE = 64  # characters: no image or video is shorter, hardly a path without a dot is longer
SHOWN = 100  # characters of a name that messages repeat
ANYWHERE = "/"
NAMING = ("url", "image", "video", "audio", "path")  # keys of dicts under which models look for names

_directories: tuple[str, ...] = ()


class RequestError(ConfigError):
    """A request that cannot be served, found before it reaches a rank. A ValueError: SGLang answers status 400."""


def allow(directories: Sequence[str]) -> None:
    """From now on requests to this process read local files below these directories only; none at all if empty."""
    global _directories
    _directories = tuple(os.path.realpath(directory) for directory in directories)


def resolve(medium, kind: str):
    """One medium of a request as SGLang's loaders take it. kind: image, video or audio, for messages.

    What is no name (bytes, tensors, preprocessed dicts, pictures) stays as it is. Raises RequestError.
    """
    if isinstance(medium, str):
        return medium if medium.startswith(SENT) else _resolve_name(medium, kind)
    if isinstance(getattr(medium, "url", None), str):  # SGLang's ImageData and VideoData
        return replace(medium, url=_resolve_name(medium.url, kind))
    if isinstance(medium, dict):
        named = {key: medium[key] for key in NAMING if isinstance(medium.get(key), str)}
        return {**medium, **{key: _resolve_name(name, kind) for key, name in named.items()}}
    if isinstance(medium, list | tuple) and any(isinstance(part, str) for part in _flat(medium)):
        raise RequestError(
            f"{kind}_data with a list of names as one {kind}", f"one file, address or base64 text per {kind}",
            "send the frames as one video file, or preprocessed"
        )  # fmt: skip
    return medium


def a(kind: str) -> str:
    """`an image`, `a video`"""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def shown(medium) -> str:
    """A medium as messages name it: short, and without the fields SGLang wraps around it."""
    text = str(getattr(medium, "url", medium))
    if text.startswith(INLINE):
        return f"{text.partition(',')[0][:SHOWN]},... ({len(text):,} characters)"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _resolve_name(name: str, kind: str) -> str:
    if name.startswith((*REMOTE, INLINE)):
        return name
    if not name.strip():
        raise RequestError(f"an empty address for the {kind}", _forms(), f"name the {kind}, or leave it out")
    if name.startswith("file://"):
        return _below(unquote(urlsplit(name).path), name, kind)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise RequestError(f"{kind} {shown(name)}", _forms(), "download it and send the file")
    inline = name.startswith(JPEG) or (len(name) >= SHORTEST_INLINE and not name.startswith("/"))
    if inline and BASE64.fullmatch(name.strip()):
        return f"{INLINE};base64,{''.join(name.split())}"
    return _below(name, name, kind)


def _below(path: str, name: str, kind: str) -> str:
    """file:// of the real path. Raises RequestError outside the allowed directories, and for what is no file there."""
    if "\0" in path or len(os.fsencode(path)) >= 4096:
        raise RequestError(f"{kind} {shown(name)!r}, which is no path", _forms(), "send a shorter path")
    real = os.path.realpath(path)
    if not any(os.path.commonpath([real, directory]) == directory for directory in _directories):
        allowed = " or ".join(_directories) or "no local file: the server listens beyond this machine"
        raise RequestError(
            f"{kind} {shown(name)}", f"files below {allowed}" if _directories else allowed,
            f"send the {kind} itself as a data: address, or start the server with --allow-local-media DIR"
        )  # fmt: skip
    if not os.path.isfile(real):
        state = "is a directory" if os.path.isdir(real) else "is not there"
        raise RequestError(
            f"{kind} {shown(name)}, which {state} on the server", f"the path of {a(kind)} file", "check the path"
        )
    if not os.access(real, os.R_OK):
        raise RequestError(f"{kind} {shown(name)}, which the server may not read", "a readable file", "chmod a+r it")
    if os.path.getsize(real) == 0:
        raise RequestError(f"{kind} {shown(name)}, which is empty", f"{a(kind)} file", "check how it was written")
    return "file://" + quote(real)


def _forms() -> str:
    return "http(s)://, data:...;base64, file:// or a path on the server"


def _flat(parts):
    for part in parts:
        if isinstance(part, list | tuple):
            yield from _flat(part)
        else:
            yield part
