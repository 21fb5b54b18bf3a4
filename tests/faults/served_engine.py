"""An engine in which a fault can be armed, and what its program sees of one; runs in the engine's own process."""

import asyncio
import os
import time
from pathlib import Path

import psutil

import sglang_mm
from sglang_mm.errors import RankFailed
from tests.faults.served_ranks import ENV, arm, run_faulty_scheduler, struck_at

PROMPT = {
    "input_ids": [99, *range(40, 240), *range(40, 240), *range(40, 240)],
    "sampling_params": {"temperature": 0, "max_new_tokens": 4},
}


class FaultyEngine(sglang_mm.Engine):
    run_scheduler_process_func = staticmethod(run_faulty_scheduler)


def slowed(running) -> dict:
    """The same prompt at full speed and with a rank that takes its time: both answers, and seconds."""
    told = {}
    for name in ("as ever", "slow"):
        if name == "slow":
            arm(Path(os.environ[ENV]), "3x slow", rank=1)
        running.loop.run_until_complete(running.tokenizer_manager.flush_cache(timeout_s=30))
        began = time.monotonic()
        answer = running.generate(**PROMPT)
        told[name] = answer["output_ids"], time.monotonic() - began
    Path(os.environ[ENV]).unlink()
    Path(os.environ[ENV]).with_suffix(".struck").unlink()
    return told


def struck(running, fault: str, layer: int) -> dict:
    """What a program sees: calls under way, later ones, what is alive and what lies around before and after its end."""
    arm(Path(os.environ[ENV]), fault, rank=1, layer=layer)
    pixels = Path(running.mm_pixels.directory)
    told = {"under way": _under_way(running)}
    told["first_s"] = time.time() - struck_at(Path(os.environ[ENV]))
    began = time.monotonic()
    told["later"] = [_raised(lambda: running.generate(**PROMPT)), _raised(running.flush_cache)]
    told["later"].append(_raised(running.get_server_info))
    told["later_s"] = time.monotonic() - began
    running.mm_watch.wait_until_ended()
    told["all_s"] = time.time() - struck_at(Path(os.environ[ENV]))
    told["alive"] = [p.name() for p in psutil.Process().children(recursive=True) if "sglang" in p.name()]
    running.shutdown()
    told["pixels"] = pixels.exists()
    told["children"] = [p.name() for p in psutil.Process().children(recursive=True)]
    return told


def _under_way(running) -> list[str]:
    """Two calls of a program that has an event loop of its own."""

    async def both():
        calls = [running.async_generate(**PROMPT), running.async_generate(**{**PROMPT, "input_ids": [7] * 600})]
        return await asyncio.gather(*calls, return_exceptions=True)

    loop = getattr(running.loop, "_loop", running.loop)
    return [_words(found) for found in loop.run_until_complete(both())]


def _raised(call) -> str:
    try:
        return _words(call())
    except Exception as error:
        return _words(error)


def _words(found) -> str:
    assert isinstance(found, RankFailed), f"{type(found).__name__}: {found}"
    return str(found)
