"""Batches against a server that runs already: order, tries, errors, what is not asked again."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sglang_mm.demo.server import free_port
from tests.batch.stub import Stub

CHAT = {"method": "POST", "url": "/v1/chat/completions"}


def openai(name: str, text: str, **body) -> dict:
    body = {"messages": [{"role": "user", "content": text}]} | body
    return {"custom_id": name, **CHAT, "body": body}


def test_answers_come_in_the_order_of_the_input(stub, asked, tmp_path):
    code, lines, told = asked(["slow 0.6 a", "b", "slow 0.3 c", "d", "e"], "--url", stub.url, "--concurrency", "3")
    assert code == 0 and [line["answer"][0] for line in lines] == list("abcde")
    assert [line["id"] for line in lines] == [f"line-{number}" for number in range(1, 6)]
    first_asked = {body["messages"][0]["content"][-1]["text"][-1] for body in stub.bodies[:3]}
    assert stub.most == 3 and first_asked == {"a", "b", "c"}
    first = lines[0]
    assert first["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    assert (first["finish_reason"], first["error"], "choices" in first) == ("stop", None, False)
    assert "5 answers, 0 errors" in told and "5/5 done" in told
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_openai_lines_get_openai_s_format(stub, asked):
    code, lines, _ = asked([openai("a/b", "x", n=1), openai("c", "refuse")], "--url", stub.url, "--concurrency", "1")
    good, bad = lines
    assert code == 3 and good["custom_id"] == "a/b" and good["error"] is None
    assert good["response"]["status_code"] == 200 and good["response"]["request_id"].startswith("batch-a_b-")
    body = good["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "x"
    assert (body["id"], body["created"]) == (good["response"]["request_id"], 0)
    assert stub.bodies[0]["rid"].startswith(body["id"] + ".") and stub.bodies[0]["n"] == 1
    assert bad["response"] == {"status_code": 400, "request_id": "batch-c", "body": bad["response"]["body"]}
    assert bad["error"] == {"code": "http_400", "message": "status 400 as asked"}


def test_two_runs_write_the_same(stub, asked, tmp_path):
    questions = ["a", openai("b", "b"), "refuse", "drop 9", {"question": 3}]
    asked(questions, "--url", stub.url)
    first = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    asked(questions, "--url", stub.url, "--concurrency", "1")
    assert (tmp_path / "out.jsonl").read_bytes() == first and first.count(b"\n") == 5


@pytest.mark.parametrize(
    ("question", "tries", "error"),
    [
        ("unavailable 2", 3, None),
        ("drop 2", 3, None),
        ("unavailable 3", 3, ("server_error", "status 503: status 503 as asked")),
        ("drop 3", 3, ("connection", "the connection broke before the answer came (ServerDisconnectedError)")),
        ("slow 2", 3, ("timeout", "no answer after 0.2 s (--item-timeout)")),
        ("refuse", 1, ("http_400", "status 400 as asked")),
        ("abort", 3, ("aborted", "the server gave the answer up")),
        ("junk", 3, ("bad_answer", "not an answer of OpenAI's API: junk")),
    ],
)
def test_what_is_tried_again(stub, asked, question, tries, error):
    code, lines, told = asked([question, "fine"], "--url", stub.url, "--item-timeout", "0.2")
    assert len(stub.bodies) == tries + 1 and len({body["rid"] for body in stub.bodies}) == tries + 1
    assert lines[1]["answer"] == "enif"
    if error is None:
        assert code == 0 and lines[0]["answer"] == question[::-1]
    else:
        assert code == 3 and (lines[0]["error"]["code"], lines[0]["error"]["message"]) == error
        assert f'error  "line-1"  {error[0]}: ' in told


def test_what_is_answered_is_not_asked_again(stub, asked, tmp_path):
    url = ("--url", stub.url)
    assert asked(["a", "b", "refuse"], *url)[0] == 3
    before, written = (tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.jsonl").stat().st_mtime_ns
    code, _, told = asked(None, *url)
    assert (code, len(stub.bodies)) == (3, 3) and "0 to ask: nothing is asked" in told
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == written
    assert asked(None, *url, "--retry-errors")[0] == 3 and len(stub.bodies) == 4
    assert (tmp_path / "out.jsonl").read_bytes() == before
    code, lines, _ = asked(["a", "b", "refuse", "c"], *url)
    assert len(stub.bodies) == 5 and len(lines) == 4 and lines[3]["answer"] == "c"
    code, lines, told = asked(["a", "B", "refuse", "c"], *url)
    assert code == 2 and "has 1 lines that are not answers" in told and lines[1]["answer"] == "b"
    code, lines, _ = asked(None, *url, "--overwrite")
    assert len(stub.bodies) == 6 and [line["answer"] for line in lines] == ["a", "B", None, "c"]


def stub_process(port: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.batch.stub", "--port", str(port)], stdout=subprocess.PIPE)


def test_a_run_that_was_broken_off_goes_on(asked, tmp_path, serving):
    gone = stub_process(free_port())
    try:
        url = re.search(r"http://[\d.:]+", gone.stdout.readline().decode())[0]
        flags = ("--url", url, "--concurrency", "1")
        code, _, told = asked(["a", "b", f"end once {tmp_path / 'ended'}", "d"], *flags)
        assert gone.wait(10) == 9
    finally:
        gone.kill()
        gone.stdout.close()
    assert code == 1 and f"{url} takes no connections" in told and "run the same command again" in told
    assert not (tmp_path / "out.jsonl").exists() and len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2
    code, _, told = asked(None, *flags)
    assert code == 1 and "does not answer" in told
    with serving(Stub(int(url.rpartition(":")[2]))) as back:
        code, lines, told = asked(None, *flags)
    assert code == 0 and [line["answer"] for line in lines][::3] == ["a", "d"] and "2 are answered already" in told
    assert [body["messages"][0]["content"][0]["text"][0] for body in back.bodies] == ["e", "d"]


def test_answers_of_another_model_or_to_other_lines_do_not_count(stub, asked, tmp_path):
    old = {"id": "line-1", "answer": "of old", "error": None, "request_id": "batch_req_0123"}
    (tmp_path / "out.jsonl.part").write_text(json.dumps(old) + "\n")
    code, lines, told = asked(["a"], "--url", stub.url)
    assert (code, lines[0]["answer"], len(lines)) == (0, "a", 1)
    assert "out.jsonl.part has 1 lines for other questions or another model: not used" in told


def test_keys(asked, serving, monkeypatch):
    with serving(Stub(key="secret")) as guarded:
        code, _, told = asked(["a"], "--url", guarded.url)
        assert code == 1 and "401: pass its --api-key" in told
        assert asked(["a"], "--url", f"{guarded.url}/v1/", "--api-key", "secret")[0] == 0
        monkeypatch.setenv("SGLANG_MM_API_KEY", "secret")
        assert asked(["b"], "--url", guarded.url, "--overwrite")[0] == 0


def test_files_travel_where_the_server_cannot_read_them(stub, asked, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"video")
    line = {"video": "v.mp4", "question": "Q"}
    asked([line], "--url", stub.url)
    asked([line | {"id": "again"}], "--url", stub.url, "--send-files", "inline", "--overwrite")
    sent = [body["messages"][0]["content"][0]["video_url"]["url"] for body in stub.bodies]
    assert sent == [(tmp_path / "v.mp4").as_uri(), "data:video/mp4;base64,dmlkZW8="]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(stub, tmp_path, number):
    source, part = tmp_path / "in.jsonl", tmp_path / "out.jsonl.part"
    source.write_text('{"question": "a"}\n{"question": "slow 30"}\n')
    command = [sys.executable, "-m", "sglang_mm.batch", str(source), str(tmp_path / "out.jsonl"), "--url", stub.url]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 30
        while not (part.exists() and part.read_text() and len(stub.bodies) == 2) and time.monotonic() < end:
            time.sleep(0.02)
        running.send_signal(number)
        said, _ = running.communicate(timeout=20)
    finally:
        running.kill()
    assert running.returncode == 128 + number and "run the same command again" in said
    assert json.loads(part.read_text())["answer"] == "a" and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no model"),
        (["--url", "127.0.0.1:30000"], "--url 127.0.0.1:30000. Allowed: http(s)://HOST:PORT"),
        (["--url", "http://h", "--cp", "2"], "--url with --cp 2"),
        (["--model-path", "M", "--sparse", "nope.json"], "--sparse nope.json"),
        (["--model-path", "M", "--dry-run"], "--dry-run. Allowed: flags of a server"),
        (["--url", "http://h", "--concurrency", "0"], "--concurrency 0"),
        (["--url", "http://h", "--item-timeout", "nan"], "--item-timeout nan"),
    ],
)
def test_flags_that_cannot_work(asked, tmp_path, flags, message):
    code, _, told = asked(["a"], *flags)
    assert code == 2 and message in told and "Remedy: " in told
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_the_files_come_first(capsys):
    from sglang_mm.batch.__main__ import main

    assert main(["--cp", "2", "in", "out"]) == 2 and "name the two files first" in capsys.readouterr().err
