"""python -m sglang_mm.batch IN.jsonl OUT.jsonl (--url URL | --model-path MODEL [any flag of the launcher])"""

import asyncio
import signal
import sys
from collections.abc import Coroutine

from sglang_mm.batch import items, records
from sglang_mm.batch.args import Asked, answering, parse
from sglang_mm.batch.items import Item
from sglang_mm.batch.journal import Journal, beside, is_error
from sglang_mm.batch.progress import Count, Lines, view
from sglang_mm.batch.run import BrokenOff, Run
from sglang_mm.batch.server import GivenServer, OwnServer, ServerLost, model_of, real
from sglang_mm.errors import ConfigError, SglangMMError

ALL_ANSWERED, BROKEN_OFF, NOTHING_ASKED, SOME_ERRORS = 0, 1, 2, 3
TICK_S = 1.0
REMEDY = "What is answered is kept: run the same command again to go on."


def main(argv: list[str]) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        asked = parse(argv)
        found = items.read(asked.source)
        if asked.out.exists() and asked.out.samefile(asked.source):
            raise ConfigError(f"IN and OUT {asked.out}", "two files", "pass another OUT")
        with Journal(asked.out) as journal:
            return batch(asked, found, journal)
    except (BrokenOff, ServerLost, OSError) as error:
        print(f"sglang_mm: {error}\n{REMEDY}", file=sys.stderr)
        return BROKEN_OFF
    except SglangMMError as error:
        print(f"sglang_mm: {error}", file=sys.stderr)
        return NOTHING_ASKED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def batch(asked: Asked, found: list[Item], journal: Journal) -> int:
    """Exit code; OUT is written unless the run is broken off."""
    decided = decided_by(asked)
    names = {item.number: item.fingerprint(decided) for item in found}
    kept = keepable(asked, journal, names.values())
    lines, to_ask = {}, []
    count = Count(len(found), 0)
    for item in found:
        name = names[item.number]
        if item.fault:
            lines[name] = records.to_line(records.failed(item, name, "invalid_input", item.fault))
        elif name in kept:
            lines[name] = kept[name]
        if name in lines:
            count.kept, count.errors = count.kept + 1, count.errors + is_error(lines[name])
        else:
            to_ask.append((item, name))
    with view(count, asked.plain) as told:
        tell_plan(asked, found, told, len(to_ask), len(journal.started.keys() - names.values()))
        if to_ask:
            code = asyncio.run(until_told(Run(asked, to_ask, journal, told).over(server_for(asked)), told))
            if code:
                told.say(f"stopped. {REMEDY}")
                return code
    journal.finish(lines.get(name) or journal.started[name] for name in map(names.get, (i.number for i in found)))
    print(f"{asked.out}: {count.total - count.errors} answers, {count.errors} errors", flush=True)
    return SOME_ERRORS if count.errors else ALL_ANSWERED


def decided_by(asked: Asked) -> dict[str, str]:
    """What answers, as far as it decides the answers. A running server is asked for its model."""
    if asked.url is not None:
        return asyncio.run(model_of(asked.url, asked.headers))
    chosen = answering(asked.launch)
    return chosen | ({"--model-path": real(chosen["--model-path"])} if "--model-path" in chosen else {})


def keepable(asked: Asked, journal: Journal, names) -> dict[str, bytes]:
    """Lines of earlier runs. Raises ConfigError if OUT holds more than this batch would put there."""
    names = set(names)
    lost = sum(not is_error(line) for name, line in journal.finished.items() if name not in names) + journal.foreign
    if lost and not asked.overwrite:
        raise ConfigError(
            f"OUT {asked.out} has {lost} lines that are not answers to the lines of IN, or not by this model",
            "a file that this batch wrote, or none",
            "pass another OUT, or --overwrite to lose those lines",
        )
    kept = dict(journal.finished)
    for name, line in journal.started.items():
        if name not in kept or is_error(kept[name]):
            kept[name] = line
    if asked.retry_errors:
        kept = {name: line for name, line in kept.items() if not is_error(line)}
    return kept


def tell_plan(asked: Asked, found: list[Item], told: Lines, to_ask: int, strangers: int) -> None:
    faults = [item for item in found if item.fault]
    told.say(f"{asked.source}: {len(found)} items, {len(faults)} cannot be asked, {told.count.kept - len(faults)} are "
             f"answered already, {to_ask} to ask" + ("" if to_ask else ": nothing is asked"))  # fmt: skip
    for item in faults:
        told.say(f"  error  line {item.number}: {item.fault}")
    if strangers:
        told.say(f"{beside(asked.out, '.part')} has {strangers} lines for other questions or another model: not used")


def server_for(asked: Asked) -> GivenServer | OwnServer:
    if asked.url is not None:
        return GivenServer(asked.url)
    return OwnServer(asked, beside(asked.out, ".server.log"))


async def until_told(work: Coroutine, told: Lines) -> int:
    """0 when the work is done, 128 + N after signal N: the work is cancelled and tidies up. A second one ends us."""
    loop, task, code = asyncio.get_running_loop(), asyncio.create_task(work), 0
    ticking = asyncio.create_task(tick(told))

    def stop(number: int) -> None:
        nonlocal code
        code = 128 + number
        task.cancel()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not code:
            raise
    finally:
        ticking.cancel()
    return code


async def tick(told: Lines) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        told.show()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
