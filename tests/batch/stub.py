"""python -m tests.batch.stub PORT: answers as OpenAI's API does, and fails as the question says.

It stands for a server where a test needs failures on demand: 503s, dropped connections, a sudden end. The question's
words, the last text of the prompt, decide:

    unavailable N | drop N    so many times status 503 | the connection closed without an answer; then an answer
    slow S                    an answer after S seconds
    refuse | abort | junk     status 400 | finish_reason "abort" | status 200 with something else
    end | end once FILE       the process ends, each time | unless FILE is there
"""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "stub"


class Stub(ThreadingHTTPServer):
    """bodies: of all requests, in the order they came. most: answered at a time. key: what clients must send."""

    daemon_threads = True

    def __init__(self, port: int = 0, key: str = ""):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.key, self.bodies, self.most, self._now = key, [], 0, 0
        self._lock, self._times = threading.Lock(), Counter()

    def come(self, question: str, body: dict) -> int:
        """How often this question was asked, with this time."""
        with self._lock:
            self.bodies.append(body)
            self._now += 1
            self.most = max(self.most, self._now)
            self._times[question] += 1
            return self._times[question]

    def go(self) -> None:
        with self._lock:
            self._now -= 1

    def handle_error(self, request, client_address):
        """Clients that closed are none of our business."""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_):
        """Quiet."""

    def do_GET(self):
        self._send(*((401, {}) if self._is_stranger() else (200, {"model_path": MODEL})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_stranger():
            return self._send(401, {"error": "no key"})
        question = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        question = question if isinstance(question, str) else question[-1]["text"]
        word, number, *_ = [*question.split(), "1", "1"]
        times = self.server.come(question, body)
        try:
            if word == "end" and not (number == "once" and Path(question.split()[2]).exists()):
                if number == "once":
                    Path(question.split()[2]).touch()
                print("the stub ends, as it was asked to", flush=True)
                os._exit(9)
            if word == "slow":
                time.sleep(float(number))
            if word == "drop" and times <= int(number):
                return self.connection.close()
            status = 503 if word == "unavailable" and times <= int(number) else 400 if word == "refuse" else 200
            self._send(status, "junk" if word == "junk" else answer(word, question) if status == 200 else wrong(status))
        finally:
            self.server.go()

    def _is_stranger(self) -> bool:
        return bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"

    def _send(self, status: int, body) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def wrong(status: int) -> dict:
    return {"object": "error", "message": f"status {status} as asked", "code": status}


def answer(word: str, question: str) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": question[::-1]}, "logprobs": None}
    choice["finish_reason"] = "abort" if word == "abort" else "stop"
    usage = {"prompt_tokens": len(question), "completion_tokens": 3, "total_tokens": len(question) + 3}
    return {"id": secrets.token_hex(8), "created": time.time_ns(), "choices": [choice], "usage": usage | {"x": None}}


if __name__ == "__main__":
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--broken" in sys.argv:
        sys.exit("the stub cannot start")
    stub = Stub(int(sys.argv[sys.argv.index("--port") + 1]))
    print(f"sglang_mm is ready at {stub.url}, process {os.getpid()}", flush=True)
    stub.serve_forever()
