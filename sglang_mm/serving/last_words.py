"""What waits for ranks when one of them fails, and how each of them gets its answer: HTTP requests, calls of an Engine.

SGLang kills the whole tree of processes at once; clients would see a connection that closed, and a program would die.
"""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isawaitable

from sglang_mm.errors import RankFailed

UNDER_WAY, REFUSED = 500, 503  # status of requests that a failure cut short, and of later ones
POLL_S = 0.02


class UnderWay:
    """The tasks that wait for ranks, in any event loops. Once `fail` was called, from any thread, `joined` raises the
    failure: at once for who comes later, and for those inside, which are cancelled for it.
    """

    def __init__(self):
        self.failure: RankFailed | None = None
        self._tasks: dict[asyncio.Task, int] = {}  # and how often it is inside
        self._cancelled: set[asyncio.Task] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tasks)

    def check(self) -> None:
        """Raises RankFailed once a rank has failed."""
        if self.failure is not None:
            raise RankFailed(self.failure.verdict, self.failure.reason) from None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """In a task of an event loop. Raises RankFailed."""
        task = asyncio.current_task()
        with self._lock:
            self._tasks[task] = self._tasks.get(task, 0) + 1
        try:
            self.check()
            yield
        except asyncio.CancelledError:
            if task in self._cancelled:
                self._cancelled.discard(task)
                task.uncancel()
                self.check()
            raise
        finally:
            with self._lock:
                self._tasks[task] -= 1
                if not self._tasks[task]:
                    del self._tasks[task]

    def fail(self, failure: RankFailed) -> None:
        """From now on nothing waits for ranks. Only the first failure counts."""
        with self._lock:
            self.failure = self.failure or failure
            tasks = list(self._tasks)
        for task in tasks:
            try:
                task.get_loop().call_soon_threadsafe(self._cancel, task)
            except RuntimeError:  # its loop is closed
                continue

    def _cancel(self, task: asyncio.Task) -> None:
        if task in self._tasks:
            self._cancelled.add(task)
            task.cancel()

    def wait_until_left(self, deadline_s: float) -> bool:
        """Whether all of them had their answers in time."""
        end = time.monotonic() + deadline_s
        while self._tasks and time.monotonic() < end:
            time.sleep(POLL_S)
        return not self._tasks

    async def wait_for(self, awaitable: Awaitable):
        """Its result. Raises what it raises, or RankFailed."""
        try:
            with self.joined():
                return await awaitable
        finally:
            if hasattr(awaitable, "close"):
                awaitable.close()  # one that was never awaited would be warned of


class Answering:
    """ASGI middleware: a request that a failure cut short is answered 500 with the reason, a later one 503.

    A stream that has begun ends with an event that holds the error.
    """

    def __init__(self, app, under_way: UnderWay):
        self.app, self.under_way = app, under_way

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = REFUSED if self.under_way.failure else UNDER_WAY
        sent: list[dict] = []  # the start, and then the end

        async def send_on(message) -> None:
            await send(message)
            if message["type"] == "http.response.start" or not message.get("more_body"):
                sent.append(message)

        try:
            with self.under_way.joined():
                await self.app(scope, receive, send_on)
        except RankFailed as failure:
            if not sent:
                await _answer(send, status, failure)
            elif len(sent) == 1:
                await _end_stream(send, sent[0], status, failure)


async def _answer(send, status: int, failure: RankFailed) -> None:
    body = json.dumps(_error(status, failure)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _end_stream(send, start: dict, status: int, failure: RankFailed) -> None:
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    is_events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
    told = f"data: {json.dumps(_error(status, failure))}\n\ndata: [DONE]\n\n".encode() if is_events else b""
    if is_events or b"content-length" not in headers:
        await send({"type": "http.response.body", "body": told})


def _error(status: int, failure: RankFailed) -> dict:
    """In the form of OpenAI's errors; SGLang's clients look at the outer `message`, OpenAI's at the inner one."""
    kind = "InternalServerError" if status == UNDER_WAY else "ServiceUnavailable"
    told = {"message": str(failure), "type": kind, "param": None, "code": status}
    return {"object": "error", **told, "error": told}


class CallersLoop:
    """An engine's event loop: whatever it runs until complete ends with RankFailed when a rank fails."""

    def __init__(self, loop: asyncio.AbstractEventLoop, under_way: UnderWay):
        self._loop, self._under_way = loop, under_way

    def run_until_complete(self, future):
        return self._loop.run_until_complete(self._under_way.wait_for(future) if isawaitable(future) else future)

    def __getattr__(self, name):
        return getattr(self._loop, name)


def raising(generate: Callable, under_way: UnderWay) -> Callable:
    """TokenizerManager.generate_request, an async generator, which raises RankFailed when a rank fails."""

    @wraps(generate)
    async def generate_request(*args, **kwargs):
        answers = generate(*args, **kwargs)
        try:
            while True:
                with under_way.joined():
                    try:
                        answer = await anext(answers)
                    except StopAsyncIteration:
                        return
                yield answer
        finally:
            await answers.aclose()

    return generate_request
