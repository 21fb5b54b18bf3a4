"""An Engine in a process of its own: SGLang kills the process that owns an engine when one of its workers fails.

One engine is alive at a time (a rank takes 1.6 GB), so a test module asks all its questions in one go.
"""

import importlib
import multiprocessing
import os
import signal
import traceback
from contextlib import contextmanager
from pkgutil import resolve_name

START_DEADLINE_S = 240
ANSWER_DEADLINE_S = 300


@contextmanager
def engine(engine_class: str = "sglang_mm:Engine", **arguments):
    """Start an engine, yield ask(method, *args, **kwargs) -> its result, shut it down; every wait has a deadline.

    method: a function of this module or `module:function`, called with the engine first, or a method of the engine.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, engine_class, arguments))
    process.start()
    theirs.close()

    def receive(deadline_s: float):
        if not ours.poll(deadline_s):
            raise TimeoutError(f"the engine process did not answer within {deadline_s} s")
        try:
            kind, value = ours.recv()
        except EOFError:
            raise RuntimeError("the engine process died; see its output above") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def ask(method: str, *args, **kwargs):
        ours.send((method, args, kwargs))
        return receive(ANSWER_DEADLINE_S)

    try:
        receive(START_DEADLINE_S)
        yield ask
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join(10)


def _serve(pipe, engine_class: str, arguments: dict) -> None:
    os.setsid()
    module, _, name = engine_class.partition(":")
    try:
        running = getattr(importlib.import_module(module), name)(**arguments)
        pipe.send(("ready", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        return
    try:
        while True:
            method, args, kwargs = pipe.recv()
            try:
                helper = resolve_name(method) if ":" in method else globals().get(method)
                value = helper(running, *args) if helper else getattr(running, method)(*args, **kwargs)
                pipe.send(("value", value))
            except Exception:
                pipe.send(("error", traceback.format_exc()))
    except EOFError:
        pass
    finally:
        running.shutdown()


def rank_infos(running) -> list[dict]:
    """What each rank's worker told about itself at the start."""
    return running._scheduler_init_result.scheduler_infos


def flush_cache(running) -> None:
    """Empty the prefix cache; SGLang refuses while the last answer is still being cleared away."""
    flushed = running.loop.run_until_complete(running.tokenizer_manager.flush_cache(timeout_s=30))
    assert flushed.success, flushed.message


def keep_prompts(running) -> None:
    """From now on remember what SGLang's processor hands to the model."""
    from sglang_mm.demo import huggingface

    processor = running.tokenizer_manager.mm_processor
    process, running.kept = processor.process_mm_data_async, []

    async def remember(*args, **kwargs):
        prepared = await process(*args, **kwargs)
        running.kept.append(huggingface.prompt_of(prepared))
        return prepared

    processor.process_mm_data_async = remember


def kept_prompts(running) -> list:
    """Prompts since keep_prompts, oldest first."""
    return running.kept
