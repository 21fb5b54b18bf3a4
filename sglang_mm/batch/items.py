"""The input, line by line: what each asks, and what is wrong with it. All of it is checked before anything starts."""

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from sglang_mm.batch import media
from sglang_mm.errors import ConfigError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
SHORT_FIELDS = ("id", "video", "image", "question")
SHORT_DEFAULTS = {"temperature": 0, "max_tokens": 1024}
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Item:
    """number: of its line, from 1. id: as the line says, or made of the number. line: decoded, if it can be.

    url, body: the request, with files as file:// addresses. fault: why it cannot be asked, or empty.
    """

    number: int
    id: str | int
    line: object
    is_short: bool
    url: str = CHAT
    body: dict = field(default_factory=dict)
    fault: str = ""

    def fingerprint(self, answering: dict[str, str]) -> str:
        """Of the line and of what answers it: an answer with the same one need not be asked for again."""
        told = json.dumps([answering, self.id, self.line, self.fault and self.number], sort_keys=True)
        return f"batch_req_{hashlib.sha256(told.encode()).hexdigest()[:32]}"


def read(source: Path) -> list[Item]:
    """Every line that is not blank. Raises ConfigError if the file cannot be read, or nothing in it can be asked."""
    try:
        lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"{source} ({error.strerror})", "a readable file of JSON lines", "check IN") from None
    folder, seen, items = source.resolve().parent, {}, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = _item(number, line, folder)
        first = seen.setdefault(str(item.id), number)
        if first != number and not item.fault:
            item = _faulty(item, f"the id {item.id!r} is that of line {first} too")
        items.append(item)
    if all(item.fault for item in items):
        faults = "; ".join(f"line {item.number}: {item.fault}" for item in items[:SHOWN_FAULTS])
        given = f"{source} has no line that can be asked" + (f" ({faults})" if faults else "")
        allowed = '{"video": FILE, "question": TEXT} or a line of OpenAI\'s batch format, one per line'
        raise ConfigError(given, allowed, "see docs/batch.md")
    return items


def _faulty(item: Item, fault: str) -> Item:
    return Item(item.number, item.id, item.line, item.is_short, item.url, fault=fault)


def _item(number: int, text: bytes, folder: Path) -> Item:
    made_id = f"line-{number}"
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        return Item(number, made_id, text.decode(errors="replace"), True, fault=f"not JSON: {error}")
    if not isinstance(line, dict):
        return Item(number, made_id, line, True, fault="not a JSON object")
    is_short = not any(name in line for name in OPENAI_FIELDS if name != "url")
    given_id = line.get("id" if is_short else "custom_id", made_id if is_short else None)
    good_id = given_id != "" and (isinstance(given_id, str) or (type(given_id) is int and is_short))
    item = Item(number, given_id if good_id else made_id, line, is_short)
    if not good_id:
        name = '"id" is not text or a whole number' if is_short else '"custom_id" is missing, or is not text'
        return _faulty(item, name)
    try:
        url, body = (CHAT, _short_body(line)) if is_short else _openai_body(line)
        for medium in media.parts_of(body):
            medium["url"] = media.address(medium["url"], folder)
    except ValueError as error:
        return _faulty(item, str(error))
    return Item(number, item.id, line, is_short, url, body)


def _openai_body(line: dict) -> tuple[str, dict]:
    if line.get("method") != "POST":
        raise ValueError(f'"method" is {line.get("method")!r}; allowed: "POST"')
    if line.get("url") not in URLS:
        raise ValueError(f'"url" is {line.get("url")!r}; allowed: {" | ".join(URLS)}')
    body = line.get("body")
    if not isinstance(body, dict):
        raise ValueError('"body" is missing, or is not an object')
    needed = "messages" if line["url"] == CHAT else "prompt"
    if not body.get(needed):
        raise ValueError(f'"body" has no "{needed}"')
    _refuse_streams(body)
    return line["url"], copy.deepcopy(body)


def _short_body(line: dict) -> dict:
    question = line.get("question")
    if not isinstance(question, str) or not question:
        raise ValueError('"question" is missing, or is not text')
    if "messages" in line:
        raise ValueError('"messages" beside "question"; allowed: one of them, "messages" in OpenAI\'s batch format')
    _refuse_streams(line)
    content = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": name}}
        for kind in ("video", "image")
        for name in _names(kind, line.get(kind))
    ]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    more = {name: copy.deepcopy(value) for name, value in line.items() if name not in SHORT_FIELDS}
    return SHORT_DEFAULTS | more | {"messages": messages}


def _names(kind: str, given: object) -> list[str]:
    names = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'"{kind}" is neither a path, an address, nor a list of them')
    return names


def _refuse_streams(fields: dict) -> None:
    if fields.get("stream"):
        raise ValueError('"stream" is set; a batch takes whole answers: leave it out')
