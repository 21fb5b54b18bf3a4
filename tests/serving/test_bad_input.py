"""Bad input is refused before work is lost, in words that help, and the server goes on.

What every bad input is answered stands in docs/bad-input.md; the tests make the page and compare it with the one that
is committed. To write it anew: SGLANG_MM_WRITE_PAGES=1 pytest tests/serving/test_bad_input.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from sglang_mm.demo import server
from sglang_mm.errors import ConfigError
from tests.house.source import ROOT
from tests.serving import bad_inputs, bad_launches

PAGE = ROOT / "docs" / "bad-input.md"
WRITE = "SGLANG_MM_WRITE_PAGES"
OURS = re.compile(r"\. Allowed: .+\. Remedy: .+\.$")
HEAD = """\
# Bad input

What is refused, and in which words. Made by `tests/serving/test_bad_input.py`, which sends every request below to one
running server of two ranks and asks it a good question after each: the answer never changes. DIR is the directory of
`--allow-local-media`; the server runs with `--max-total-tokens 6000 --media-url-max-file-size-mb 1
--allowed-media-domains 127.0.0.1` and `REQUEST_TIMEOUT=2`.

Most messages say what was given, what is allowed and what to do. The others are SGLang's own.
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("media") / "allowed"
    made.mkdir()
    bad_inputs.write_files(made)
    return made


@pytest.fixture(scope="module")
def url(checkpoint, directory, tmp_path_factory):
    port, log = server.free_port(), tmp_path_factory.mktemp("log") / "log"
    command = [sys.executable, "-m", "sglang_mm.launch", "--model-path", checkpoint, "--cp", "2", "--port", str(port)]
    command += ["--allow-local-media", str(directory), "--allowed-media-domains", bad_inputs.ALLOWED_HOST]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *bad_inputs.SERVER], stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "REQUEST_TIMEOUT": "2"},
        )  # fmt: skip
    try:
        server.wait_until_ready(process, log)
        assert f"files      requests may name files below {directory}" in log.read_text()
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, "the server has ended"
    finally:
        server.stop(process)


def send(url: str, request: bad_inputs.Request) -> tuple[int, dict]:
    reply = requests.post(url + request.path, json=request.body, timeout=60)
    return reply.status_code, reply.json()


def message_of(reply: dict) -> str:
    """The three shapes of SGLang's errors."""
    error = reply.get("error", reply)
    return error if isinstance(error, str) else error["message"]


def answer_of(reply: dict):
    return reply["output_ids"] if "output_ids" in reply else reply["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def refused(url, directory) -> list[tuple[bad_inputs.Request, int, str]]:
    """Every bad request, its status and its message; after each a good one gave the first good one's answer."""
    told = []
    good, good_video = bad_inputs.good_text(), bad_inputs.good_video(directory)
    expected, expected_of_video = answer_of(send(url, good)[1]), answer_of(send(url, good_video)[1])
    with bad_inputs.media_host() as host:
        for request in bad_inputs.requests_of(directory, host):
            status, reply = send(url, request)
            assert answer_of(send(url, good)[1]) == expected, f"after {request.what}"
            told.append((request, status, normal(message_of(reply), directory)))
    requests.post(f"{url}/flush_cache?timeout=30", timeout=60).raise_for_status()
    assert answer_of(send(url, good_video)[1]) == expected_of_video
    return told


def normal(message: str, directory: Path) -> str:
    """Without what differs from run to run."""
    text = message.replace(str(directory), "DIR").replace(str(directory.parent), "DIR/..")
    text = re.sub(r"127\.0\.0\.1:(?!9/)\d+", "127.0.0.1:PORT", text)
    return re.sub(r"\[\d\d:\d\d:\d\d\] ", "", text).strip()


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[tuple[str, str]]:
    """(what, message) of every launch that cannot work."""
    told, scratch = [], tmp_path_factory.mktemp("launches")
    for what, attempt in bad_launches.every(scratch):
        with pytest.raises(ConfigError) as refusal:
            attempt()
        text = str(refusal.value).replace(str(scratch), "DIR")
        told.append((what, re.sub(r"--port \d+", "--port PORT", text)))
    return told


def test_every_bad_request_is_the_clients_fault(refused):
    assert len(refused) >= 60
    assert {request.what: status for request, status, _ in refused if status != 400} == {}


def test_messages_tell_what_matters(refused):
    assert {request.what: text for request, _, text in refused if request.tells not in text} == {}
    assert {request.what: text for request, _, text in refused if len(text) > 900} == {}
    ours = [text for _, _, text in refused if OURS.search(text)]
    assert len(ours) >= 0.75 * len(refused)


def test_files_outside_are_told_apart_by_nobody(refused):
    texts = {request.what: text for request, _, text in refused}
    there, gone = texts["file outside --allow-local-media"], texts["file that is not there outside it"]
    assert there.replace("secret.png", "X") == gone.replace("gone.png", "X")


def test_launches_are_refused_in_our_words(launches):
    assert len(launches) >= 20 and all(OURS.search(text) for _, text in launches)


def test_page_is_what_was_seen(refused, launches):
    page = HEAD + "\n## Requests\n\n" + table([(r.what, str(status), text) for r, status, text in refused])
    page += "\n## Launches\n\n" + table([(what, text) for what, text in launches])
    if os.environ.get(WRITE):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, f"write it anew with {WRITE}=1"


def table(rows: list[tuple]) -> str:
    head = ("input", "status", "message") if len(rows[0]) == 3 else ("input", "message")
    lines = [head, ("---",) * len(head), *[tuple(map(cell, row)) for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")
