"""python -m sglang_mm.launch.monitor [--url URL | --events ADDRESS]: the prefills of a running server, live."""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request

from sglang_mm.errors import ConfigError, SglangMMError
from sglang_mm.events import Subscriber
from sglang_mm.launch.monitor_board import Board
from sglang_mm.launch.monitor_health import wait_tables
from sglang_mm.launch.monitor_views import JsonView, printable, view

URL = "http://127.0.0.1:30000"
KEY_ENV = "SGLANG_MM_API_KEY"
ANSWER_DEADLINE_S = 10.0
TICK_S = 0.1
LOOK_S = 1.5  # the newest of every rank is told to whoever comes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_mm.launch.monitor",
        description="Show the prefills of a running server: tokens, stage, layers of each rank, time left.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default=URL, help="the server, asked for its event stream (default %(default)s)")
    where.add_argument("--events", metavar="ADDRESS", help="the event stream itself, tcp://127.0.0.1:PORT")
    parser.add_argument("--api-key", default=os.environ.get(KEY_ENV), help=f"the server's (default: ${KEY_ENV})")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--plain", action="store_true", help="plain lines; the default without a terminal")
    form.add_argument("--json", action="store_true", help="every event as one line of JSON")
    form.add_argument("--stragglers", action="store_true", help="how long ranks have waited for each other, and end")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--requests", type=int, metavar="N", help="end when N requests have been prefilled")
    ends.add_argument("--once", action="store_const", const=1, dest="requests", help="the same as --requests 1")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end after so long (default: never)")
    return parser


def address_of(url: str, api_key: str | None) -> str:
    """Where a server publishes its events. Raises ConfigError when it does not say."""
    status = f"{url.rstrip('/')}/sglang_mm/status"
    allowed = "the address of a running server of sglang_mm"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(status, headers=headers), timeout=ANSWER_DEADLINE_S
        ) as reply:
            told = json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(f"{status} answered {error.code}", "the server's API key", "pass --api-key") from None
        raise ConfigError(f"{status} answered {error.code}", allowed, "check --url") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"{status} could not be read ({reason})", allowed, "start the server, or pass --url"
        ) from None
    address = told.get("events") if isinstance(told, dict) else None
    if not isinstance(address, str):
        raise ConfigError(f"{status} names no event stream", allowed, "check --url; the server may be another one")
    return address


def watch(subscriber: Subscriber, shown: JsonView, requests: int | None, timeout_s: float | None) -> int:
    """Until `requests` requests are over (0), or timeout_s have passed (0; 1 if requests were waited for)."""
    board, start, ticked_at = Board(), time.monotonic(), 0.0
    while timeout_s is None or time.monotonic() - start < timeout_s:
        message = subscriber.receive(TICK_S)
        if message is not None:
            shown.heard(message, board.apply(message))
        if time.monotonic() - ticked_at >= TICK_S:
            ticked_at = time.monotonic()
            shown.tick(board)
        if requests is not None and board.requests >= requests:
            return 0
    return 0 if requests is None else 1


def waits(subscriber: Subscriber, seconds: float) -> list[str]:
    """Tables of how long each rank has waited for others, by exchange, and whom the others wait for."""
    board, lines, end = Board(), [], time.monotonic() + seconds
    while time.monotonic() < end:
        message = subscriber.receive(TICK_S)
        lines += board.health.apply(message) if message is not None else []
    return [*wait_tables(board.health.waits), *lines] or ["no rank has told how long it waited"]


def main(argv: list[str]) -> int:
    asked = build_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        address = asked.events or address_of(asked.url, asked.api_key)
        if asked.stragglers:
            with Subscriber(address, beats=True) as subscriber:
                print(*map(printable, waits(subscriber, asked.timeout or LOOK_S)), sep="\n", flush=True)
            return 0
        with Subscriber(address, beats=True) as subscriber, view(asked.plain, asked.json) as shown:
            code = watch(subscriber, shown, asked.requests, asked.timeout)
    except SglangMMError as error:
        print(f"sglang_mm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if code:
        print(f"sglang_mm: fewer than {asked.requests} requests in {asked.timeout:g} s", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
