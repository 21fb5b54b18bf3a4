"""An engine of two ranks, the second of which believes that it runs on another machine, and what is asked of it."""

import asyncio
import gc
import os
import time
import weakref

import sglang_mm
from sglang_mm.events import Subscriber
from sglang_mm.events.messages import PrefillStarted
from sglang_mm.pixels import wire
from sglang_mm.serving import worker
from tests.pixels.processing import MARKERS, sent_video
from tests.serving.cases import TOP

DEADLINE_S = 60
CHUNK = 320
SAMPLING = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
SCORED = {"sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": TOP}


def run_scheduler(server_args, port_args, gpu_id, tp_rank, *more, **named) -> None:
    if tp_rank == 1:
        os.environ[wire.MACHINE] = "another machine"
    worker.run_scheduler_process(server_args, port_args, gpu_id, tp_rank, *more, **named)


class HalfElsewhere(sglang_mm.Engine):
    """leases: every one so far, without keeping it."""

    run_scheduler_process_func = staticmethod(run_scheduler)

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.leases, give = [], self.mm_pixels.lease

        def remembered(request: str = ""):
            lease = give(request)
            self.leases.append(weakref.ref(lease))
            return lease

        self.mm_pixels.lease = remembered

    def asked_from_elsewhere(self) -> int:
        """Questions that the second rank asked the store, all of which must have been answered."""
        assert self.mm_pixels._answering.refused == 0
        return self.mm_pixels._answering.answered

    async def ask(self, **request) -> dict:
        return await asyncio.wait_for(self.async_generate(**request), DEADLINE_S)


def question(video: str, tail: str = "What moves? ", videos: int = 1) -> dict:
    return {"prompt": MARKERS["video"] * videos + tail, "video_data": [video] * videos}


def all_questions(engine: HalfElsewhere, video: str) -> dict:
    """Each one's outcome, how many files were there meanwhile, and whether its lease lived on afterwards."""
    told = {}
    for what in (by_both_ways, several, batch, refused, aborted_between_chunks, aborted_in_the_queue):
        before = engine.asked_from_elsewhere()
        told[what.__name__] = engine.loop.run_until_complete(what(engine, video))
        if what is refused:
            gc.collect()  # an exception and the frames it came through hold each other, and the request
        told[what.__name__]["asked"] = engine.asked_from_elsewhere() - before
        told[what.__name__]["leases"] = sum(lease() is not None for lease in engine.leases)
    until = time.monotonic() + engine.mm_pixels.linger_s + 10
    while engine.mm_pixels.files() and time.monotonic() < until:
        time.sleep(0.1)
    return {**told, "files": engine.mm_pixels.files(), "leases": len(engine.leases)}


async def by_both_ways(engine, video: str) -> dict:
    """The same request with pixels by reference, and by value."""
    processor, found = engine.tokenizer_manager.mm_processor, {}
    for way, store in (("reference", engine.mm_pixels), ("value", None)):
        processor.store = store
        found[way] = await engine.ask(**question(video), **SCORED)
        await _flushed(engine)
    processor.store = engine.mm_pixels
    return found


async def several(engine, video: str) -> dict:
    """Two answers to one request."""
    answers = await engine.ask(**question(video, "And now? "), sampling_params={**SAMPLING, "n": 2})
    return {"answers": [answer["output_ids"] for answer in answers]}


async def batch(engine, video: str) -> dict:
    """Two requests in one, one of them with two videos."""
    one, two = question(video, "First. "), question(video, "Both. ", videos=2)
    together = {name: [one[name], two[name]] for name in one}
    asking = asyncio.create_task(engine.ask(**together, sampling_params=SAMPLING))
    before, most = set(engine.mm_pixels.files()), 0
    while not asking.done():
        most = max(most, len(set(engine.mm_pixels.files()) - before))
        await asyncio.sleep(0.01)
    return {"answers": [answer["output_ids"] for answer in await asking], "files": most}


async def refused(engine, video: str) -> dict:
    """What is found to be too long when its frames have been written: a lease more, and no file."""
    before, leases = set(engine.mm_pixels.files()), len(engine.leases)
    try:
        await engine.ask(**question(video, "word " * 20_000), sampling_params=SAMPLING)
    except ValueError as error:
        return {
            "error": str(error),
            "written": len(engine.leases) - leases,
            "left": set(engine.mm_pixels.files()) - before,
        }
    return {}


async def aborted_between_chunks(engine, video: str) -> dict:
    """The second chunk has begun, and frames of later chunks have not been read."""
    await _flushed(engine)
    with Subscriber(engine.events) as hears:
        rid = "to be aborted"
        asking = asyncio.create_task(engine.ask(**question(video, "Never. ", 2), sampling_params=SAMPLING, rid=rid))
        chunk = 0
        while not chunk and not asking.done():
            event = await asyncio.to_thread(hears.receive, 1)
            if isinstance(event, PrefillStarted) and event.requests == [rid]:
                chunk = event.chunk
        engine.tokenizer_manager.abort_request(rid)
        ended = await asking
        return {"ended": ended["meta_info"]["finish_reason"], "chunk": chunk, "answer": ended["output_ids"]}


async def aborted_in_the_queue(engine, video: str) -> dict:
    """One that waits while another is answered, which is aborted afterwards."""
    endless = {**SAMPLING, "max_new_tokens": 3000}
    running = asyncio.create_task(engine.ask(**question(sent_video(4, 56, 84)), sampling_params=endless, rid="running"))
    await _dispatched(engine, "running")
    waiting = asyncio.create_task(engine.ask(**question(video, "Later. "), sampling_params=endless, rid="waiting"))
    await _dispatched(engine, "waiting")
    ends = []
    for rid, asking in (("waiting", waiting), ("running", running)):
        await asyncio.sleep(0.3)
        assert not asking.done()
        engine.tokenizer_manager.abort_request(rid)
        ends.append((await asking)["meta_info"]["finish_reason"])
    after = await engine.ask(**question(video), **SCORED)
    return {"ends": ends, "after": after}


async def _flushed(engine) -> None:
    flushed = await engine.tokenizer_manager.flush_cache(timeout_s=DEADLINE_S)
    assert flushed.success, flushed.message


async def _dispatched(engine, rid: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not (rid in engine.tokenizer_manager.rid_to_state and engine.tokenizer_manager.rid_to_state[rid].dispatched):
        assert time.monotonic() < until, f"{rid} was not handed to the ranks"
        await asyncio.sleep(0.01)
