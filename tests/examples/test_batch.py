"""A batch of video questions against a real server: killed in the middle, resumed, and equal to an unbroken one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.examples.test_examples import PAIR, outcome, started
from tests.house.source import ROOT

ITEMS = 14
KILLED_AFTER = 3  # answers


def lines_of(served) -> list[dict]:
    """Short and OpenAI's lines, videos, pictures and texts; one that the server refuses, and one that is nothing."""
    video = Path(served.video)
    found = [
        {"id": f"v{number}", "video": video.name, "question": f"What moves {number}?", "max_tokens": 24}
        for number in range(ITEMS - 6)
    ]
    media = [{"type": "video_url", "video_url": {"url": str(video)}}, {"type": "text", "text": "Where?"}]
    body = {"messages": [{"role": "user", "content": media}], "temperature": 0, "max_tokens": 8, "n": 2}
    chat = {"custom_id": "chat/1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    prompt = {"prompt": "Once", "temperature": 0, "max_tokens": 8}
    found.insert(2, chat)
    found.insert(4, {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": prompt})
    found.insert(6, {"id": "two", "image": served.picture, "question": "Two?", "n": 2, "max_tokens": 4})
    found.insert(8, {"id": "bad", "video": str(ROOT / "README.md"), "question": "Is this a video?"})
    found.insert(9, {"id": "gone", "video": "gone.mp4", "question": "Where is it?"})
    return [*found, {"question": "Is this inline?", "image": served.picture, "max_tokens": 4}]


def command(served, source: Path, out: Path, *flags: str) -> list[str]:
    flags = ("--url", served.url, "--concurrency", "3", *flags)
    return [sys.executable, "-m", "sglang_mm.batch", str(source), str(out), *flags]


@pytest.fixture(scope="module")
def batch(served):
    """The input beside the video, and what an unbroken run writes."""
    source = Path(served.video).with_name("in.jsonl")
    source.write_text("".join(json.dumps(line) + "\n" for line in lines_of(served)))
    out = source.with_name("whole.jsonl")
    done = subprocess.run(command(served, source, out), capture_output=True, text=True, timeout=180)
    assert done.returncode == 3, done.stdout + done.stderr
    return source, out


def test_answers(batch):
    records = [json.loads(line) for line in batch[1].read_text().split("\n")[:-1]]
    asked = [json.loads(line) for line in batch[0].read_text().split("\n")[:-1]]
    names = [line.get("custom_id", line.get("id", f"line-{ITEMS}")) for line in asked]
    assert [record.get("custom_id", record["id"]) for record in records] == names
    by_name = dict(zip(names, records))
    videos = [by_name[f"v{number}"] for number in range(ITEMS - 6)]
    assert all(record["usage"]["prompt_tokens"] > 8 * PAIR and record["finish_reason"] for record in videos)
    assert len({record["answer"] for record in videos}) > 1, "other questions, other answers"
    chat, text = by_name["chat/1"]["response"], by_name["text"]["response"]
    assert len(chat["body"]["choices"]) == 2 and chat["body"]["usage"]["prompt_tokens"] > 8 * PAIR
    assert text["body"]["object"] == "text_completion" and text["body"]["created"] == 0
    assert len(by_name["two"]["choices"]) == 2
    errors = {name: record["error"]["code"] for name, record in by_name.items() if record["error"]}
    assert errors == {"bad": "http_400", "gone": "invalid_input"}


def test_killed_and_resumed(served, batch, tmp_path):
    source, whole = batch
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    running = subprocess.Popen(command(served, source, out), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (part.exists() and part.read_bytes().count(b"\n") >= KILLED_AFTER) and time.monotonic() < end:
        time.sleep(0.005)
    running.kill()
    running.wait(10)
    answered = part.read_bytes().count(b"\n")
    assert KILLED_AFTER <= answered < ITEMS - 1 and not out.exists()
    with part.open("ab") as torn:
        torn.write(b'{"id": "v9", "answ')
    resumed = subprocess.run(command(served, source, out), capture_output=True, text=True, timeout=180)
    assert resumed.returncode == 3, resumed.stdout + resumed.stderr
    assert f"{answered} are answered already, {ITEMS - 1 - answered} to ask" in resumed.stdout
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


def test_files_inside_requests(served, batch, tmp_path):
    line = json.loads(batch[0].read_text().partition("\n")[0])
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line | {"video": served.video}) + "\n")
    flags = ("--send-files", "inline")
    done = subprocess.run(command(served, source, tmp_path / "out.jsonl", *flags), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    inline, by_path = (json.loads(path.read_text().split("\n")[0]) for path in (tmp_path / "out.jsonl", batch[1]))
    assert (inline["answer"], inline["usage"]) == (by_path["answer"], by_path["usage"])


def test_the_example_s_input_is_one(served, tmp_path):
    code, said, errors = outcome(
        started("batch_questions.py", str(Path(served.video).parent), str(tmp_path / "in.jsonl"))
    )
    assert code == 0, errors
    lines = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["shapes.mp4#1", "shapes.mp4#2"] and "1 videos x 2 questions" in said
    from sglang_mm.batch import items

    assert [item.fault for item in items.read(tmp_path / "in.jsonl")] == ["", ""]
