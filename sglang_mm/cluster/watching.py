"""Actors that end: nobody else notices, for the process that serves HTTP waits for none of them."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

LOOK_EVERY_S = 1.0
REASON_LENGTH = 300


def watch(actors: Sequence[Any], on_end: Callable[[int, str], None]) -> Callable[[], None]:
    """Call on_end(rank, reason) once for each actor that ends; the returned function ends the watch.

    actors: in the order of ranks, each busy with a method that runs as long as it lives.
    """
    import ray

    # one more call waits behind the one that never ends: it is answered when its actor is gone
    pending = {actor.get_info.remote(): rank for rank, actor in enumerate(actors)}
    stopping = threading.Event()

    def look() -> None:
        while pending and not stopping.is_set():
            try:
                ended, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK_EVERY_S)
            except Exception:  # the connection to Ray is gone: whoever closed it knows
                return
            for reference in ended:
                rank = pending.pop(reference)
                if not stopping.is_set():
                    on_end(rank, _reason(ray, reference))

    thread = threading.Thread(target=look, name="sglang_mm actors", daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join(2 * LOOK_EVERY_S)

    return stop


def end_actors(actors: Sequence[Any]) -> None:
    """At once, wherever they are; one that has ended counts too, and so do all when the connection is gone."""
    import ray

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


def _reason(ray, reference) -> str:
    try:
        ray.get(reference, timeout=LOOK_EVERY_S)
    except Exception as error:
        return reason_of(error)
    return "its event loop ended"


def reason_of(error: Exception) -> str:
    """Ray's words about an actor's end, in one line, without its ids."""
    words = " ".join(str(error).split())
    _, because, reason = words.partition("is dead because ")
    return (reason if because else words)[:REASON_LENGTH].rstrip(".")
