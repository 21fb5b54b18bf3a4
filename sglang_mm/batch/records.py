"""Lines of the output. What differs between two runs of the same batch (times, random ids) is not in them."""

import hashlib
import json
import re

from sglang_mm.batch.items import Item

SHOWN = 2000  # characters of a server's answer that is not what was expected
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
MORE_THAN_TEXT = ("logprobs", "tool_calls", "reasoning_content")  # of a choice or its message
LONGEST_ID = 64


def answered(item: Item, fingerprint: str, body: dict) -> dict:
    """body: the server's, of status 200."""
    if not item.is_short:
        body = body | {"id": request_id(item), "created": 0}
        return _openai(item, fingerprint, {"status_code": 200, "request_id": request_id(item), "body": body}, None)
    first = body["choices"][0]
    counted = body.get("usage") or {}
    record = _short(item, fingerprint, None) | {
        "answer": first["message"]["content"],
        "finish_reason": first["finish_reason"],
        "usage": {name: counted[name] for name in USAGE if name in counted},
    }
    return record | ({"choices": body["choices"]} if _says_more(body["choices"]) else {})


def refused(item: Item, fingerprint: str, status: int, body: object) -> dict:
    """body: the server's, of status 4xx; text if it is not JSON."""
    error = {"code": f"http_{status}", "message": message_of(body)}
    if item.is_short:
        return _short(item, fingerprint, error)
    response = {"status_code": status, "request_id": request_id(item), "body": body}
    return _openai(item, fingerprint, response, error)


def failed(item: Item, fingerprint: str, code: str, message: str) -> dict:
    """code: invalid_input, timeout, connection, server_error, bad_answer, aborted, or server_ended."""
    error = {"code": code, "message": message[:SHOWN]}
    return _short(item, fingerprint, error) if item.is_short else _openai(item, fingerprint, None, error)


def _short(item: Item, fingerprint: str, error: dict | None) -> dict:
    record = {"id": item.id, "answer": None, "finish_reason": None, "usage": None, "error": error}
    return record | {"request_id": fingerprint}


def _openai(item: Item, fingerprint: str, response: dict | None, error: dict | None) -> dict:
    return {"id": fingerprint, "custom_id": item.id, "response": response, "error": error}


def _says_more(choices: list[dict]) -> bool:
    return len(choices) > 1 or any((choices[0] | choices[0]["message"]).get(name) for name in MORE_THAN_TEXT)


def request_id(item: Item) -> str:
    """What the server's log has for this item, before the suffix of each try."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", str(item.id))
    if name != str(item.id) or len(name) > LONGEST_ID:
        name = f"{name[:LONGEST_ID]}-{hashlib.sha256(repr(item.id).encode()).hexdigest()[:8]}"
    return f"batch-{name}"


def fingerprint_of(record: object) -> str | None:
    """That of a line of the output; None for a line that is not one."""
    if not isinstance(record, dict) or "error" not in record:
        return None
    found = record.get("id" if "custom_id" in record else "request_id")
    return found if isinstance(found, str) and found.startswith("batch_req_") else None


def usage_of(record: dict) -> dict:
    """Tokens of an answer, {} where they are not known."""
    if "custom_id" not in record:
        return record.get("usage") or {}
    body = (record.get("response") or {}).get("body")
    counted = body.get("usage") if isinstance(body, dict) else None
    return counted if isinstance(counted, dict) else {}


def message_of(body: object) -> str:
    """The words of an error: SGLang's, OpenAI's, FastAPI's, or whatever came."""
    if isinstance(body, dict):
        found = body.get("error", body)
        found = (found.get("message") or found.get("detail") or found) if isinstance(found, dict) else found
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)[:SHOWN]
    return str(body)[:SHOWN]


def to_line(record: dict) -> bytes:
    """One line of UTF-8; escaped where a text is not one that UTF-8 has."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"
