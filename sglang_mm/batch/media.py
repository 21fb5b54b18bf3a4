"""Media of an item: files are found when the input is checked, and read, if they are to travel, when it is asked."""

import base64
import copy
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

ELSEWHERE = ("http://", "https://", "data:")  # not files
KINDS = ("image_url", "video_url", "audio_url")
UNKNOWN_TYPE = "application/octet-stream"


def parts_of(body: dict) -> Iterator[dict]:
    """The `{"url": ...}` of every medium in the messages of a chat completion, in order."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            for kind in KINDS:
                medium = part.get(kind)
                if isinstance(medium, dict) and isinstance(medium.get("url"), str):
                    yield medium


def address(name: str, folder: Path) -> str:
    """What a request says for a medium: a path becomes file://. Relative ones start at folder.

    Raises ValueError with what is wrong with a file.
    """
    if name.startswith(ELSEWHERE):
        return name
    path = Path(unquote(urlsplit(name).path)) if name.startswith("file://") else folder / name
    try:
        if not path.is_file():
            raise ValueError(f"{name} is not a file; looked for at {path}")
        with path.open("rb") as file:
            if not file.read(1):
                raise ValueError(f"{name} is empty")
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    return path.resolve().as_uri()


def inline(body: dict) -> dict:
    """The same request with its files as data: addresses. Raises OSError if one is gone by now."""
    body = copy.deepcopy(body)
    for medium in parts_of(body):
        if medium["url"].startswith("file://"):
            path = Path(unquote(urlsplit(medium["url"]).path))
            kind = mimetypes.guess_type(path.name)[0] or UNKNOWN_TYPE
            medium["url"] = f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
    return body
