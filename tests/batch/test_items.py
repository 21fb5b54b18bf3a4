"""What each line of the input asks, and what is said of lines that ask nothing."""

import json

import pytest

from sglang_mm.batch import items, media
from sglang_mm.errors import ConfigError

GOOD = {"question": "What moves?"}
OPENAI = {
    "custom_id": "a",
    "method": "POST",
    "url": items.CHAT,
    "body": {"messages": [{"role": "user", "content": "Hi"}]},
}


def read(tmp_path, *lines, end: str = "\n"):
    source = tmp_path / "in.jsonl"
    written = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    source.write_bytes(end.encode().join(line if isinstance(line, bytes) else line.encode() for line in written))
    return items.read(source)


def test_a_short_line_is_a_chat_completion(tmp_path):
    for name in ("v.mp4", "w.mp4", "p q.png"):
        (tmp_path / name).write_bytes(b"x")
    line = {"id": 7, "video": ["v.mp4", str(tmp_path / "w.mp4")], "image": "p q.png", "max_tokens": 5, **GOOD}
    (item,) = read(tmp_path, line)
    assert (item.fault, item.id, item.url, item.is_short) == ("", 7, items.CHAT, True)
    asked = item.body.pop("messages")[0]["content"]
    assert item.body == {"temperature": 0, "max_tokens": 5}
    assert [part["type"] for part in asked] == ["video_url", "video_url", "image_url", "text"]
    addresses = [medium["url"] for medium in media.parts_of({"messages": [{"content": asked}]})]
    assert addresses == [(tmp_path / name).as_uri() for name in ("v.mp4", "w.mp4", "p q.png")]
    assert asked[-1]["text"] == GOOD["question"]


def test_openai_lines_are_sent_as_they_are(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"x")
    body = {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v.mp4"}}]}], "n": 2}
    one, two = read(
        tmp_path,
        OPENAI | {"body": body},
        {**OPENAI, "custom_id": "b", "url": items.COMPLETIONS, "body": {"prompt": "P"}},
    )
    assert (one.fault, two.fault, two.url, two.body) == ("", "", items.COMPLETIONS, {"prompt": "P"})
    assert one.body["messages"][0]["content"][0]["video_url"]["url"] == (tmp_path / "v.mp4").as_uri()
    assert one.body["n"] == 2 and one.line["body"] == body, "the line itself is not changed"


@pytest.mark.parametrize("name", ["https://host/v.mp4", "data:video/mp4;base64,AAAA"])
def test_addresses_are_not_files(tmp_path, name):
    (item,) = read(tmp_path, GOOD | {"video": name})
    assert item.fault == "" and item.body["messages"][0]["content"][0]["video_url"]["url"] == name


def test_inlined_files_are_their_bytes(tmp_path):
    (tmp_path / "p.png").write_bytes(b"picture")
    (item,) = read(tmp_path, GOOD | {"image": ["p.png", "https://host/p.png"]})
    sent = [medium["url"] for medium in media.parts_of(media.inline(item.body))]
    assert sent == ["data:image/png;base64,cGljdHVyZQ==", "https://host/p.png"]
    assert next(media.parts_of(item.body))["url"].startswith("file://")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        (b'{"question": "\xff"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ({"video": "v.mp4"}, '"question" is missing'),
        ({"question": 3}, '"question" is missing, or is not text'),
        (GOOD | {"id": ""}, '"id" is not text or a whole number'),
        (GOOD | {"id": True}, '"id" is not text or a whole number'),
        (GOOD | {"video": "nowhere.mp4"}, "nowhere.mp4 is not a file; looked for at "),
        (GOOD | {"video": "file:///nowhere.mp4"}, "file:///nowhere.mp4 is not a file"),
        (GOOD | {"video": "empty.mp4"}, "empty.mp4 is empty"),
        (GOOD | {"image": "x" * 5000}, "cannot be read (File name too long)"),
        (GOOD | {"image": "a\0b"}, "a\0b"),
        (GOOD | {"image": [3]}, '"image" is neither a path'),
        (GOOD | {"messages": []}, '"messages" beside "question"'),
        (GOOD | {"stream": True}, '"stream" is set'),
        ({**OPENAI, "custom_id": None}, '"custom_id" is missing'),
        ({"method": "POST", "url": items.CHAT, "body": {}}, '"custom_id" is missing'),
        ({**OPENAI, "method": "GET"}, '"method" is \'GET\'; allowed: "POST"'),
        ({**OPENAI, "url": "/v1/embeddings"}, "\"url\" is '/v1/embeddings'; allowed: /v1/chat/completions | "),
        ({**OPENAI, "body": []}, '"body" is missing'),
        ({**OPENAI, "body": {"prompt": "P"}}, '"body" has no "messages"'),
        ({**OPENAI, "body": {**OPENAI["body"], "stream": True}}, '"stream" is set'),
        (GOOD | {"id": "first"}, "the id 'first' is that of line 1 too"),
    ],
)
def test_a_bad_line_is_a_fault_and_the_others_are_asked(tmp_path, line, fault):
    (tmp_path / "empty.mp4").write_bytes(b"")
    first, bad, last = read(tmp_path, GOOD | {"id": "first"}, line, GOOD)
    assert fault in bad.fault and bad.number == 2
    assert (first.fault, last.fault, last.id) == ("", "", "line-3")


@pytest.mark.parametrize("lines", [["{", "[]"], ["", "  "], []])
def test_an_input_without_a_good_line_is_refused(tmp_path, lines):
    with pytest.raises(ConfigError, match="has no line that can be asked"):
        read(tmp_path, *lines)


def test_lines_end_where_they_end(tmp_path):
    """Not at the other characters that Python takes for line ends; byte order marks and blank lines do not count."""
    strange = '{"question": "a\u2028b\x85c"}'
    found = read(tmp_path, "\ufeff" + strange, "", json.dumps(GOOD), end="\r\n")
    assert [(item.number, item.fault) for item in found] == [(1, ""), (3, "")]
    assert found[0].line["question"] == "a\u2028b\x85c"


def test_fingerprints(tmp_path):
    spaced, same = '{"max_tokens":  5, "id": "x", "question": "Q"}', '{"id":"x","question":"Q","max_tokens":5}'
    model = {"--model-path": "M"}
    one, two = (read(tmp_path, line)[0].fingerprint(model) for line in (spaced, same))
    assert one == two
    (item,) = read(tmp_path, same)
    others = [item.fingerprint({"--model-path": "N"}), item.fingerprint(model | {"--sparse": "auto"})]
    others += [read(tmp_path, same.replace("5", "6"))[0].fingerprint(model)]
    others += [read(tmp_path, same.replace('"x"', '"y"'))[0].fingerprint(model)]
    first, twice = read(tmp_path, same, same)
    others += [twice.fingerprint(model)]
    assert first.fingerprint(model) == one and len({one, *others}) == 6
