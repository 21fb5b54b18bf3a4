"""What ranks of the pool do in rings that break in other ways than in the matrix. Each job returns plain values."""

import gc
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_mm.errors import ConfigError, RingBroken
from sglang_mm.events.naming import named
from sglang_mm.kernels import join_partials
from sglang_mm.parallel.distributed import DistributedTransport
from tests.faults.ranks import JOIN_S, joined
from tests.kernels.paged_cases import Case, draw

STEPS = 4
HANGS_AT = 2  # the step of the decode in which a rank no longer answers
LENGTHS = [40, 11, 24]


def _seen(error: RingBroken, began: float) -> dict:
    own = {name: getattr(error, name) for name in ("rank", "stage", "silent", "layer", "waited_s")}
    return {**own, "text": str(error), "elapsed_s": time.monotonic() - began}


def decode(rank: int, ranks: int, rendezvous: str, culprit: int, deadline_s: float) -> dict:
    """Decode steps over keys in pages of all ranks, as served; the culprit hangs in one of them."""
    cases = [draw(ranks, 4, [length + step for length in LENGTHS], seed=step) for step in range(STEPS)]
    with joined(rank, ranks, rendezvous, deadline_s) as transport:
        steps = 0
        began = time.monotonic()
        try:
            for steps, case in enumerate(cases):
                if rank == culprit and steps == HANGS_AT:
                    time.sleep(deadline_s + 1.5)  # the others have asked and been answered
                began = time.monotonic()
                out, _ = _over_all_ranks(case, transport)
                torch.testing.assert_close(out, case.everywhere()[0], rtol=1e-12, atol=1e-12)
        except RingBroken as error:
            return {"steps": steps, **_seen(named(error), began), "own": error.rank}
    return {"steps": STEPS}


def _over_all_ranks(case: Case, transport: DistributedTransport) -> tuple[torch.Tensor, torch.Tensor]:
    """As the served decode does it: one message per rank and layer."""
    out, lse = case.attend(transport.rank)
    packed = torch.cat([out, lse.T.unsqueeze(-1)], dim=-1)
    parts = transport.all_to_all([packed] * transport.size, [len(out)] * transport.size, "partial results")
    gathered = torch.stack(parts)
    return join_partials(gathered[..., :-1], gathered[..., -1].transpose(1, 2).contiguous())


def some_do_not_come(
    rank: int, ranks: int, rendezvous: str, absent: tuple[int, ...], deadline_s: float, late: int = -1
) -> dict:
    """All join; the absent ones take part in nothing, and one comes when most of the deadline has passed.

    `now`: what another thread reads while this one waits.
    """
    with joined(rank, ranks, rendezvous, deadline_s) as transport:
        if rank in absent:
            time.sleep(deadline_s + 0.5)
            return {}
        read, began = [], time.monotonic()
        if rank == late:
            time.sleep(0.7 * deadline_s)
        reader = threading.Timer(deadline_s / 2, lambda: read.append(transport.waits.now))
        reader.start()
        try:
            transport.check_equal(1, "something")
        except RingBroken as error:
            told = _seen(error, began)
            reader.join()
            now = read[0] and {"ranks": read[0].ranks, "stage": read[0].stage, "since_s": read[0].since - began}
            return {**told, "now": now, "then": transport.waits.now}
    return {}


def never_joins(rank: int, ranks: int, rendezvous: str, absent: int, deadline_s: float) -> float:
    """Seconds until a rank gives up on a world that is not complete."""
    began = time.monotonic()
    if rank != absent:
        with suppress(RuntimeError):
            dist.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=deadline_s),
            )
        assert not dist.is_initialized()
    return time.monotonic() - began


def hangs_up(rank: int, ranks: int, rendezvous: str, culprit: int, holds_s: float) -> dict:
    """The culprit hangs up with messages of its own under way; the others wait for it with a long deadline.

    Nobody lets go of anything for holds_s: what they notice, they notice from connections that were ended on purpose.
    """
    with joined(rank, ranks, rendezvous, JOIN_S) as transport:
        transport.check_equal(1, "something")
        began, mine, told = time.monotonic(), torch.ones(4), {}
        try:
            for hop in range(1, 10):
                arriving = transport.shift([mine], [(4,)], f"hop {hop}")
                if rank == culprit and hop == 2:
                    transport.hang_up()
                    break
                arriving.wait()
        except RingBroken as error:
            told, kept = _seen(error, began), error
            assert kept.__traceback__ is not None
        time.sleep(max(0.0, began + holds_s - time.monotonic()))
        assert arriving.arrivals
    return told


def _exchange_a_lot(transport: DistributedTransport, held: list) -> None:
    """Two hops under way, as a schedule has them; held: weak references to what travels."""
    sent = [torch.ones(1 << 20), torch.ones(1 << 20)]
    hops = [transport.shift([tensor], [(1 << 20,)], "hop") for tensor in sent]
    held += [weakref.ref(tensor) for tensor in [*sent, *(hop.arrivals[0] for hop in hops)]]
    for hop in hops:
        hop.wait()
    transport.check_equal(1, "something")


def after_the_end(rank: int, ranks: int, rendezvous: str, absent: int, deadline_s: float) -> dict:
    """What is left of a broken ring: its error, and no tensor."""
    told = {}
    with joined(rank, ranks, rendezvous, deadline_s) as transport:
        if rank == absent:
            time.sleep(deadline_s + 0.5)
            return told
        held = []
        with suppress(RingBroken):
            _exchange_a_lot(transport, held)
        gc.collect()
        told["let go"] = [tensor() is None for tensor in held]
        began = time.monotonic()
        for attempt in ("again", "once more"):
            try:
                transport.check_equal(1, "something else")
            except RingBroken as error:
                told[attempt] = {"is_same": error.stage == "hop", "rank": error.rank}
        told["elapsed_s"] = time.monotonic() - began
        transport.close()
        told["close_s"] = time.monotonic() - began
    return told


def closed(rank: int, ranks: int, rendezvous: str) -> dict:
    """A ring that is closed though nothing broke, twice."""
    with joined(rank, ranks, rendezvous, JOIN_S) as transport:
        transport.check_equal(1, "something")
        waits = {stage: asdict(waits) for stage, waits in transport.waits.take().items()}
        transport.close()
        transport.close()
        try:
            transport.check_equal(1, "something")
        except ConfigError as error:
            return {"text": str(error), "waits": waits, "is_initialized": dist.is_initialized()}
    return {}
