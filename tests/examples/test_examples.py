"""The examples and programs of SGLang's frontend language, as a user runs them, against one server of two ranks."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from sglang_mm.demo import server
from sglang_mm.tiny import write_checkpoint, write_video
from tests.examples.sgl_video import as_sgl_video, frames_of
from tests.house.source import ROOT

PAIR = 144  # tokens of two frames of 224 x 224, enlarged to the least size of a video: 12 x 12 cells of 28 x 28
PAGE = 64  # prefix hits end with a page of K/V
TOLERANCE = 1e-4  # what this project allows between two computations of one log-probability in fp32
needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="sgl.video reads files by OpenCV")


def started(name: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def outcome(process: subprocess.Popen, deadline_s: float = 120) -> tuple[int, str, str]:
    """Exit code, what was printed, and the errors; the process is gone after that."""
    try:
        printed, errors = process.communicate(timeout=deadline_s)
        return process.returncode, printed, errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def said(served) -> dict[str, str]:
    """What the examples with the OpenAI client print; the first meets an empty cache, the others run side by side."""
    requests.post(f"{served.url}/flush_cache?timeout=30", timeout=60).raise_for_status()
    common = ("--url", served.url, "--video", served.video)
    ended = {"openai_video.py": outcome(started("openai_video.py", *common, "--max-tokens", "8"))}
    options = {"multi_turn.py": ("--max-tokens", "8"), "logprobs.py": ("--tokens", "2", "--top", "3")}
    running = {name: started(name, *common, *more) for name, more in options.items()}
    ended |= {name: outcome(process) for name, process in running.items()}
    assert all(code == 0 for code, *_ in ended.values()), ended
    return {name: printed for name, (_, printed, _) in ended.items()}


@pytest.fixture(scope="module")
def told(served) -> dict:
    """What programs.py saw; in a process of its own, as a client is."""
    command = [sys.executable, "-m", "tests.examples.programs", served.url, served.video, served.picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(re.search(r"^JSON (.*)$", done.stdout, re.MULTILINE)[1])


def pairs(answer: dict, text: int) -> float:
    return (answer["prompt_tokens"] - text) / PAIR


def test_every_frame_of_a_program_arrives(told):
    text = told["1 frames"]["prompt_tokens"] - PAIR
    assert [pairs(told[f"{count} frames"], text) for count in (16, 8, 7, 1)] == [8, 4, 4, 1]
    ran = told["16 frames"]["sglang_mm"][-1]
    assert (ran["schedule"], ran["ranks"], ran["new_tokens"]) == ("ring", 2, text + 8 * PAIR)
    assert told["7 frames"]["logprobs"] != told["8 frames"]["logprobs"]


def ask(served, text: str, **request) -> dict:
    requests.post(f"{served.url}/flush_cache?timeout=30", timeout=60).raise_for_status()
    body = {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0}, "return_logprob": True}
    return requests.post(f"{served.url}/generate", json=body | request, timeout=120)


def shown_as(kind: str) -> str:
    return f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>What moves?<|im_end|>\n"


def test_a_program_s_frames_are_the_file_s(served):
    """Sixteen frames, two a second, are what the server takes of this file itself: same pixels, same times."""
    file = "data:video/mp4;base64," + base64.b64encode(Path(served.video).read_bytes()).decode()
    native = ask(served, shown_as("video"), video_data=[file]).json()["meta_info"]
    frames = frames_of(served.video, 16)
    sent = ask(served, shown_as("image"), image_data=as_sgl_video(frames)).json()["meta_info"]
    moved = ask(served, shown_as("image"), image_data=as_sgl_video([*frames[8:], *frames[:8]])).json()["meta_info"]
    assert native["prompt_tokens"] == sent["prompt_tokens"] == moved["prompt_tokens"]
    mine, theirs, other = (read["output_token_logprobs"] for read in (sent, native, moved))
    assert [token for _, token, _ in mine] == [token for _, token, _ in theirs]
    differences = [[abs(a[0] - b[0]) for a, b in zip(mine, against)] for against in (theirs, other)]
    assert max(differences[0]) <= TOLERANCE < 10 * TOLERANCE < max(differences[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_video_is_refused_and_the_server_goes_on(served, stream):
    refused = ask(served, shown_as("image"), image_data="video:AAAA", stream=stream)
    assert "no PNG at byte 0" in refused.text and "Remedy: " in refused.text
    assert stream or refused.status_code == 400
    crowded = ask(served, shown_as("image"), image_data=[as_sgl_video(frames_of(served.video, 2))] * 2)
    assert crowded.status_code == 400 and "1 markers of images" in crowded.text
    assert ask(served, "still there?").ok


def test_pictures_and_other_templates(told):
    video, picture = (answer["prompt_tokens"] for answer in told["default template"])
    assert video - picture == told["8 frames"]["prompt_tokens"] - told["picture"]["prompt_tokens"]
    assert told["8 frames"]["prompt_tokens"] - told["picture"]["prompt_tokens"] == 4 * PAIR - 64


def test_several_media_in_their_order(told):
    one, other = told["video first"], told["picture first"]
    assert one["prompt_tokens"] == other["prompt_tokens"]
    assert max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"])) > 10 * TOLERANCE
    assert told["two videos"]["prompt_tokens"] == told["16 frames"]["prompt_tokens"] + 2 * PAIR + 2


def test_times_reach_the_model(served):
    """Frames of eight seconds as frames of a minute: other positions. The cache may not give one for the other."""
    frames, text = frames_of(served.video, 16), shown_as("image")
    said = [ask(served, text, image_data=as_sgl_video(frames, header)) for header in ("", "span=7.5;", "span=60;")]
    guessed, timed, slower = (reply.json()["meta_info"]["output_token_logprobs"] for reply in said)
    assert max(abs(a[0] - b[0]) for a, b in zip(guessed, timed)) <= TOLERANCE, "half a second apart, said or guessed"
    assert max(abs(a[0] - b[0]) for a, b in zip(guessed, slower)) > 10 * TOLERANCE


def test_the_cache_knows_times(told):
    guessed, timed, again = (told[name] for name in ("half a second apart", "as far apart as they are", "again"))
    assert guessed["prompt_tokens"] == timed["prompt_tokens"]
    assert (timed["cached_tokens"], again["cached_tokens"]) == (0, (timed["prompt_tokens"] - 1) // PAGE * PAGE)


def test_later_turns_and_forks_find_the_video_cached(told):
    first, second = told["turns"]
    assert second["cached_tokens"] > first["prompt_tokens"] - PAGE > 2 * PAIR
    assert all(fork["cached_tokens"] > 3 * PAIR - PAGE for fork in told["forks"])


def test_batches_streams_and_constraints(told):
    few, more = told["batch"]
    assert more["prompt_tokens"] - few["prompt_tokens"] == PAIR
    assert told["streamed"][0] == told["streamed"][1] != ""
    assert re.fullmatch("[0-9]{2}", told["digits"])
    best = max(zip(told["scores"], ["yes", "no", "a bit"]))
    assert told["choice"] == best[1] and len(set(told["scores"])) == 3


def test_openai_client(said):
    said = said["openai_video.py"]
    tokens, rows = re.search(r"^(\d+) tokens of prompt, 8 of answer$", said, re.M), re.search(r"\[(.*)\]", said)
    assert "ring over 2 ranks" in said and int(tokens[1]) > 8 * PAIR
    assert sum(map(int, rows[1].split(","))) == int(tokens[1]), "nothing was cached"


def test_multi_turn(said):
    counts = re.findall(r"(\d+) tokens of prompt, of them cached: (\d+)", said["multi_turn.py"])
    (first, _), (second, cached) = (map(int, pair) for pair in counts)
    assert second > first and second > cached > 8 * PAIR - PAGE


def test_logprobs(said):
    lines = said["logprobs.py"].splitlines()
    shares = [[float(share) for share in re.findall(r"' (\d\.\d+)", line.partition("of:")[2])] for line in lines]
    assert [len(share) for share in shares] == [3, 3]
    assert all(sum(share) <= 1.002 and share == sorted(share, reverse=True) for share in shares)


@needs_opencv
def test_frontend_program(served):
    said = started("frontend_video.py", "--url", served.url, "--video", served.video, "--frames", "8")
    code, said, errors = outcome(said)
    assert code == 0, errors
    assert re.search(r"'day'|'night'", said) and int(re.search(r"(\d+) tokens of prompt", said)[1]) > 4 * PAIR


def test_failures_show_in_the_exit_code(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"")
    nobody = ("--url", f"http://127.0.0.1:{server.free_port()}", "--video", str(tmp_path / "v.mp4"))
    running = [started(name, *nobody) for name in ("openai_video.py", "multi_turn.py", "logprobs.py")]
    assert all(outcome(process)[0] not in (0, None) for process in running)


@pytest.mark.slow
def test_engine_offline(tmp_path):
    model = str(write_checkpoint(tmp_path / "tiny"))
    videos = [str(write_video(tmp_path / f"{name}.mp4", seconds=8, fps=2, seed=name)) for name in range(2)]
    code, said, errors = outcome(started("engine_offline.py", "--model", model, "--video", *videos), 240)
    assert code == 0, errors[-3000:]
    assert [int(re.search(rf"{re.escape(video)}: (\d+) tokens", said)[1]) > 8 * PAIR for video in videos] == [True] * 2
    assert said.count("'new_tokens': ") == 2


def test_every_example_is_listed():
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert files == set(re.findall(r"^\| `(\w+\.py)`", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE))
