"""The demo's server and its client: real processes, real HTTP, every wait with a deadline."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests

from sglang_mm.errors import SglangMMError

START_DEADLINE_S = 600
ANSWER_DEADLINE_S = 600


@contextmanager
def server(model_path: str, cp: int, log: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Start `python -m sglang_mm.launch` on a free port, yield its URL, stop it. Raises with the log's last lines.

    flags: more of the command line.
    """
    port = free_port()
    command = [sys.executable, "-m", "sglang_mm.launch", "--model-path", model_path, "--tp", "1", "--cp", str(cp)]
    command += [*flags, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, log: Path, deadline_s: float = START_DEADLINE_S) -> None:
    """Until the readiness line stands in the log."""
    end = time.monotonic() + deadline_s
    while "sglang_mm is ready at" not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            state = "ended" if process.poll() is not None else f"was not ready after {deadline_s:.0f} s"
            raise SglangMMError(
                f"the server {state}; its last lines:\n" + "\n".join(log.read_text().splitlines()[-30:])
            )
        time.sleep(0.2)


def stop(process: subprocess.Popen, deadline_s: float = 30) -> None:
    """SIGTERM, and SIGKILL to the whole session if it does not end in time."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(deadline_s)


def ask(url: str, video: Path, question: str, new_tokens: int, on_text, custom_params: dict | None = None) -> dict:
    """OpenAI chat completion with `video_url`, streamed: {id, text, ttft_s, seconds}."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_DEADLINE_S, max_retries=0)
    content = [
        {"type": "video_url", "video_url": {"url": video.resolve().as_uri()}},
        {"type": "text", "text": question},
    ]
    start, first, text = time.perf_counter(), None, ""
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        extra_body={"ignore_eos": True, "custom_params": custom_params},
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter() - start
            text += piece
            on_text(piece)
    return {"id": chunk.id, "text": text, "ttft_s": first, "seconds": time.perf_counter() - start}


def forget(url: str) -> None:
    """Empty the prefix cache."""
    _post(f"{url}/flush_cache?timeout=30", {})  # SGLang refuses while the last answer is still being cleared away


def generate(url: str, prompt: str, video: Path, new_tokens: int, top: int, custom_params: dict | None = None) -> dict:
    """SGLang's native endpoint, with token ids and log-probabilities."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, "custom_params": custom_params}
    body = {"text": prompt, "video_data": [str(video.resolve())], "sampling_params": sampling}
    return _post(f"{url}/generate", body | {"return_logprob": True, "top_logprobs_num": top}).json()


def record(url: str, rid: str) -> dict:
    """What ran for one request."""
    return _checked(requests.get(f"{url}/sglang_mm/requests/{rid}", timeout=30)).json()


def nodes(url: str) -> dict[str, list[int]]:
    """Name of each node, empty without Ray, and the ranks that run there, as they tell it themselves."""
    found: dict[str, list[int]] = {}
    for rank in _checked(requests.get(f"{url}/sglang_mm/status", timeout=30)).json()["ranks"]:
        found.setdefault(rank["node"], []).append(rank["rank"])
    return found


def _post(url: str, body: dict) -> requests.Response:
    return _checked(requests.post(url, json=body, timeout=ANSWER_DEADLINE_S))


def _checked(reply: requests.Response) -> requests.Response:
    if not reply.ok:
        raise SglangMMError(f"{reply.url} answered {reply.status_code}: {reply.text[:2000]}")
    return reply
