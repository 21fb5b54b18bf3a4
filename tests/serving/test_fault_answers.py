"""What waits for ranks gets its answer when one fails: HTTP requests in a real uvicorn, and calls of a program."""

import asyncio
import json
import pickle
import threading
import time

import pytest
import requests
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from sglang_mm.demo.server import free_port
from sglang_mm.errors import RankFailed
from sglang_mm.events.messages import Verdict
from sglang_mm.serving.last_words import Answering, CallersLoop, UnderWay, raising

VERDICT = Verdict(rank=1, what="gone", reason="its process ended: exit code 7", layer=3, stage="layers")
FAILURE = RankFailed(VERDICT)
REASON = "rank 1 (layer 3, stage layers): its process ended: exit code 7"
WITHIN_S = 3.0


def application(under_way: UnderWay) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Answering, under_way=under_way)

    @app.middleware("http")  # SGLang's app has some of these, each with a task group of its own
    async def pass_on(request, call_next):
        return await call_next(request)

    @app.get("/forever")
    async def forever():
        await asyncio.sleep(60)

    @app.get("/stream")
    async def stream():
        async def chunks():
            yield b'data: {"text": "so far"}\n\n'
            await asyncio.sleep(60)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/quick")
    async def quick():
        return {"fine": True}

    return app


@pytest.fixture
def served():
    """(url, under_way) of a server in a thread."""
    import uvicorn

    under_way, port = UnderWay(), free_port()
    server = uvicorn.Server(uvicorn.Config(application(under_way), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", under_way
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive(), "the server waits for requests that had their answers"


def asked(url: str, answers: list) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=20)))
    thread.start()
    return thread


def until_inside(under_way: UnderWay, count: int) -> None:
    until = time.monotonic() + 10
    while len(under_way) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(under_way) == count


def test_requests_under_way_and_later_ones_are_told_why(served):
    url, under_way = served
    assert requests.get(f"{url}/quick", timeout=10).json() == {"fine": True}
    plain, streamed = [], []
    threads = [asked(f"{url}/forever", plain), asked(f"{url}/stream", streamed)]
    until_inside(under_way, 2)
    time.sleep(0.2)  # until the stream has begun
    began = time.monotonic()
    under_way.fail(FAILURE)
    assert under_way.wait_until_left(WITHIN_S)
    for thread in threads:
        thread.join(WITHIN_S)
    assert time.monotonic() - began < WITHIN_S
    assert plain[0].status_code == 500 and REASON in plain[0].json()["message"]
    assert plain[0].json()["error"] == {
        "message": str(FAILURE),
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    first, error, done = [line.removeprefix("data: ") for line in streamed[0].text.split("\n\n") if line]
    assert streamed[0].status_code == 200 and json.loads(first) == {"text": "so far"} and done == "[DONE]"
    assert json.loads(error)["error"]["code"] == 500 and REASON in json.loads(error)["error"]["message"]
    later = requests.get(f"{url}/quick", timeout=10)
    assert later.status_code == 503 and REASON in later.json()["error"]["message"]


def test_calls_under_way_and_later_ones_raise():
    under_way = UnderWay()
    loop = asyncio.new_event_loop()
    callers = CallersLoop(loop, under_way)

    async def numbers():
        yield 1
        await asyncio.sleep(60)

    async def two():
        generate = raising(numbers, under_way)
        first, second = generate(), generate()
        assert [await anext(first), await anext(second)] == [1, 1]
        threading.Timer(0.1, under_way.fail, [FAILURE]).start()
        return await asyncio.gather(anext(first), anext(second), return_exceptions=True)

    try:
        found = loop.run_until_complete(two())  # the loop of a program of its own: only what it waits for is cancelled
        assert [type(error) for error in found] == [RankFailed, RankFailed] and REASON in str(found[0])
        for call in (asyncio.sleep(60), numbers().__anext__()):
            with pytest.raises(RankFailed, match="exit code 7"):
                callers.run_until_complete(call)
    finally:
        loop.close()


def test_a_call_that_blocks_the_program_ends():
    under_way, loop = UnderWay(), asyncio.new_event_loop()
    try:
        assert CallersLoop(loop, under_way).run_until_complete(asyncio.sleep(0, "value")) == "value"
        threading.Timer(0.1, under_way.fail, [FAILURE]).start()
        began = time.monotonic()
        with pytest.raises(RankFailed) as raised:
            CallersLoop(loop, under_way).run_until_complete(asyncio.sleep(60))
        assert time.monotonic() - began < WITHIN_S and raised.value.verdict == VERDICT
    finally:
        loop.close()


def test_a_cancellation_of_somebody_else_stays_one():
    under_way = UnderWay()

    async def cancelled():
        task = asyncio.ensure_future(under_way.wait_for(asyncio.sleep(60)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert not len(under_way)


def test_the_end_of_a_generator_is_no_failure():
    under_way, loop = UnderWay(), asyncio.new_event_loop()

    async def one():
        yield 1

    try:
        answers = raising(one, under_way)()
        callers = CallersLoop(loop, under_way)
        assert callers.run_until_complete(answers.__anext__()) == 1
        with pytest.raises(StopAsyncIteration):
            callers.run_until_complete(answers.__anext__())
    finally:
        loop.close()


def test_a_failure_can_be_pickled():
    copy = pickle.loads(pickle.dumps(FAILURE))
    assert (str(copy), copy.verdict) == (str(FAILURE), VERDICT)
    assert "SGLang gave up" in str(RankFailed(None))
