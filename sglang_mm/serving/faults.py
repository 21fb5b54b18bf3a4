"""What a rank does when something fails in it: tells the hub, learns who is to blame, and lets the others go.

Whatever raises inside a rank, while it loads or serves, passes here: an exception of a kernel, a wait that ended at the
deadline, ranks that differ, no memory left. SGLang then ends the process, and the supervisor all the others.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from sglang_mm.config import Config
from sglang_mm.events.naming import named
from sglang_mm.events.vitals import vitals
from sglang_mm.parallel.transport import Transport
from sglang_mm.parallel.waiting import EDGES_S, Wait, joined
from sglang_mm.serving.ray_worker import NODE

logger = logging.getLogger(__name__)
LATER_S = 3.0  # SGLang's own waits on a device end the whole process: ours, which say why, come first
_transports: list[Transport] = []  # of this rank


def while_loading(load, scheduler, *args, **kwargs) -> None:
    """Around-hook on Scheduler.__init__, in the process of a rank, from its first moment on."""
    from sglang.srt.runtime_context import get_parallel

    vitals.start(get_parallel().tp_rank, node=os.environ.get(NODE, ""))
    vitals.stage = "loading"
    with _told():
        load(scheduler, *args, **kwargs)
    vitals.stage = ""


def while_serving(run, scheduler) -> None:
    """Around-hook on Scheduler.run_event_loop, which ends when the server does."""
    with _told():
        bound_waits(Config.from_env().deadline_s)
        forget_names_of_shared_memory()
        run(scheduler)
    vitals.stop()


def join(*transports: Transport | None) -> None:
    """The transports of this rank: what it waits for is told with its heartbeats."""
    _transports[:] = [transport for transport in transports if transport is not None and transport.size > 1]
    vitals.follow(_waits_now, _take_waits, EDGES_S)


@contextmanager
def decoding() -> Iterator[None]:
    """Around a batch that is no prefill. After an exception the place stays, so that it can be told."""
    vitals.stage = "decode"
    yield
    vitals.stage, vitals.layer = "", -1


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = named(error)
        notes = "; ".join(getattr(told, "__notes__", ()))
        logger.error("sglang_mm: this rank ends: %s: %s%s", type(told).__name__, told, f" ({notes})" if notes else "")
        for transport in _transports:
            transport.close()
        if told is error:
            raise
        raise told from error


def bound_waits(deadline_s: float) -> None:
    """SGLang's own collectives, as the broadcast of requests, wait no longer than ours; unless --dist-timeout is given.

    Its ranks exchange requests all the time, also while they have nothing to do, so that one of them waits for as long
    as another works alone. Not while they load: then one may work alone for minutes.
    """
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().dist_timeout is not None:
        return
    for group in _groups():
        for inner, seconds in ((group.cpu_group, deadline_s), (group.device_group, deadline_s + LATER_S)):
            if inner is not None and dist.get_world_size(inner) > 1:
                is_gloo = dist.get_backend(inner) == "gloo"
                dist.set_timeout(timedelta(seconds=deadline_s if is_gloo else seconds), inner)


def forget_names_of_shared_memory() -> None:
    """SGLang's queues between ranks have been opened by all their readers: without names, their memory goes with the
    last process, however that ends. With them, a rank killed on another node would leave some there each time.
    """
    for group in _groups():
        buffer = getattr(getattr(group, "mq_broadcaster", None), "buffer", None)
        if buffer is not None and buffer.is_creator:
            buffer.shared_memory.unlink()
            buffer.is_creator = False  # or it would do so again at the end


def _groups() -> list:
    """SGLang's groups that this rank is in, each once."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    groups = (parallel.world_group, parallel.tp_group, parallel.attn_tp_group, parallel.attn_cp_group)
    return list({id(group): group for group in groups if group is not None}.values())


def _waits_now() -> Wait | None:
    return next((wait for transport in _transports if (wait := transport.waits.now)), None)


def _take_waits() -> dict:
    return joined([transport.waits.take() for transport in _transports])
