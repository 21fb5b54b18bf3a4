"""Where SGLang would end everything at once, in the process that started the ranks: told to our supervisor instead.

SGLang does so when a rank sends it SIGQUIT, when a child process has ended, when its first request fails, and when its
own loops raise. Without a supervisor, or once it is closed, SGLang does what it always does.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sglang.srt.environ import envs
from sglang.srt.managers.tokenizer_manager import SignalHandler

from sglang_mm.config import Config
from sglang_mm.errors import RankFailed
from sglang_mm.events import EventHub
from sglang_mm.serving.last_words import Answering, CallersLoop, raising
from sglang_mm.serving.supervisor import PATIENCE_S, Supervisor, current, ending, is_only_one

DIED = re.compile(r"Rank (\d+) scheduler died .*exit code: (-?\d+)")  # what SGLang raises while ranks load


def instead_of_dying(kill, parent_pid, include_parent: bool = True, *args, **kwargs):
    """Around-hook on kill_process_tree: this process may not kill itself while clients wait for an answer."""
    watch = current()
    if watch is None or not include_parent or parent_pid != os.getpid():
        return kill(parent_pid, include_parent, *args, **kwargs)
    watch.gave_up("SGLang ended itself, for the reason in the log")


def instead_of_watching(start, watchdog) -> None:
    """Around-hook on SubprocessWatchdog.start, called when all ranks have loaded: our supervisor looks after them."""
    watch = current()
    if watch is None:
        return start(watchdog)
    watch.follow(dict(zip(watchdog._names, watchdog._processes)))


def files_of(port_args) -> list[Path]:
    """Where SGLang's processes find each other, and tell their load; it makes these files, and leaves them."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    fields = [value for value in vars(port_args).values() if isinstance(value, str)]
    sockets = [Path(value.removeprefix("ipc://")) for value in fields if value.startswith("ipc:///")]
    return [*sockets, Path(shm_path_for(port_args.instance_id))]


def at_the_end(stop, watchdog) -> None:
    """Around-hook on SubprocessWatchdog.stop, called before SGLang ends its processes on purpose."""
    if watch := current():
        watch.close()
    stop(watchdog)


class Signals(SignalHandler):
    """SGLang's signal handlers, but that a rank's SIGQUIT does not kill this process."""

    def running_phase_sigquit_handler(self, signum=None, frame=None):
        watch = current()
        if watch is None:
            return super().running_phase_sigquit_handler(signum, frame)
        if self.tokenizer_manager.crash_dump_folder:
            # without its stacks of all ranks, for which it sleeps five seconds while clients wait
            with envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.override(False):
                self.tokenizer_manager.dump_requests_before_crash()
        if is_only_one():  # of several engines each finds out about its own ranks
            watch.gave_up("a process of SGLang failed, for the reason in the log")


@contextmanager
def served(config: Config, hub: EventHub, http_server, until_the_end: ExitStack) -> Iterator[Supervisor]:
    """Around the life of SGLang's HTTP server. When a rank fails: exit code 3, and the reason as the last line.

    http_server: SGLang's module, whose app gets a middleware. until_the_end: closed before the process ends by force.
    """
    with Supervisor(hub, config.deadline_s, config.world_size) as watch:
        http_server.app.add_middleware(Answering, under_way=watch.under_way)
        watch.ends_process_by(lambda: stop_serving(http_server), until_the_end.close)
        try:
            with explained(watch):
                yield watch
                watch.raise_if_lost()
        except RankFailed as failure:
            print(f"sglang_mm: {failure}", file=sys.stderr, flush=True)
            sys.exit(failure.exit_code)


@contextmanager
def explained(watch: Supervisor) -> Iterator[None]:
    """Inside, what SGLang raises because a rank failed becomes RankFailed."""
    try:
        yield
    except RankFailed:
        raise
    except Exception as error:
        if died := DIED.search(str(error)):
            rank, exit_code = map(int, died.groups())
            watch.hub.lost(rank, f"its process ended while it loaded: {ending(exit_code)}")
        verdict = watch.hub.verdict(PATIENCE_S)
        if died or verdict:
            watch.wait_until_ended()
            raise watch.failure or RankFailed(verdict, str(error)) from None
        raise


def stop_serving(http_server) -> None:
    """End uvicorn's loop from another thread."""
    state = http_server.get_global_state()
    manager = state.tokenizer_manager if state else None
    if manager is None or manager._server_stop_hook is None:
        return  # it does not serve yet: SGLang raises as soon as it sees that its ranks are gone
    if manager.event_loop is None:
        return manager._server_stop_hook()

    def stop() -> None:
        for task in manager.asyncio_tasks:  # they would be missed when the loop closes
            task.cancel()
        manager._server_stop_hook()

    manager.event_loop.call_soon_threadsafe(stop)


def guard(engine, watch: Supervisor) -> None:
    """Calls of this engine raise RankFailed when a rank fails, those under way and all later ones."""
    manager = engine.tokenizer_manager
    manager.generate_request = raising(manager.generate_request, watch.under_way)
    engine.loop = CallersLoop(engine.loop, watch.under_way)
