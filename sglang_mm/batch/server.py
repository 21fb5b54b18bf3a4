"""The server that answers: one that runs already, or one of our own, started and watched."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

from sglang_mm.batch.args import KEY_ENV, Asked, value_of
from sglang_mm.errors import SglangMMError

READY = b"sglang_mm is ready at"
TICK_S = 0.2
STOP_DEADLINE_S, KILL_DEADLINE_S = 30.0, 15.0  # the guard's, and what it takes after that
MODEL_DEADLINE_S = 30.0
LAST_LINES, LINE_WIDTH = 20, 300
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServerLost(SglangMMError):
    """Nobody answers any more. starting: it never did. unreachable: no connection could be made."""

    def __init__(self, reason: str, *, starting: bool = False):
        super().__init__(reason)
        self.starting = starting


class GivenServer:
    """Of --url: neither started nor stopped here."""

    restarts, log = 0, None

    def __init__(self, url: str):
        self.url = url

    async def start(self) -> None:
        """Nothing to do; the first request shows whether it is there."""

    async def ended(self) -> None:
        """Never returns: only requests can tell."""
        await asyncio.Event().wait()

    def why(self) -> str:
        return ""

    async def stop(self) -> None:
        """It is not ours."""


class OwnServer:
    """python -m sglang_mm.launch, behind a guard that ends it when this process ends, however that happens.

    log: everything it prints, over all its starts.
    """

    def __init__(self, asked: Asked, log: Path):
        self._asked, self.restarts, self.log = asked, asked.restarts, log
        self._process: asyncio.subprocess.Process | None = None
        self._begin = 0
        self.url = ""
        log.write_bytes(b"")

    async def start(self) -> None:
        """Until it is ready. Raises ServerLost with its last lines."""
        command = [sys.executable, "-m", "sglang_mm.batch.guard", str(STOP_DEADLINE_S), *self._command()]
        self._begin = self.log.stat().st_size
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=os.environ | ({KEY_ENV: self._asked.api_key} if self._asked.api_key else {}),
            )
        end = time.monotonic() + self._asked.start_timeout
        while READY not in self._said():
            if self._process.returncode is not None:
                raise ServerLost(self.why(), starting=True)
            if time.monotonic() > end:
                reason = f"the server was not ready after {self._asked.start_timeout:g} s (--start-timeout)"
                raise ServerLost(f"{reason}; its last lines:\n{self._last_lines()}", starting=True)
            await asyncio.sleep(TICK_S)

    def _command(self) -> list[str]:
        flags = list(self._asked.launch)
        host = value_of(flags, "--host") or "127.0.0.1"
        port = value_of(flags, "--port") or str(_free_port())
        flags += [] if value_of(flags, "--host") else ["--host", host]
        flags += [] if value_of(flags, "--port") else ["--port", port]
        host = ANYWHERE.get(host, host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return [sys.executable, "-m", "sglang_mm.launch", *flags]

    async def ended(self) -> None:
        """Returns when the server's process is gone."""
        await self._process.wait()

    def why(self) -> str:
        """For people: how it ended, and its last lines."""
        return f"the server ended with exit code {self._process.returncode}; its last lines:\n{self._last_lines()}"

    async def stop(self) -> None:
        """Close the guard's pipe and wait for it. The server gets SIGTERM, and SIGKILL for all its processes."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_DEADLINE_S + KILL_DEADLINE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _said(self) -> bytes:
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read()

    def _last_lines(self) -> str:
        lines = self._said().decode(errors="replace").split("\n")
        shown = [line[:LINE_WIDTH] for line in lines if line.strip()][-LAST_LINES:]
        return "\n".join(f"    {line}" for line in shown) + f"\n  all of them: {self.log}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def model_of(url: str, headers: dict[str, str]) -> dict[str, str]:
    """What a running server answers with, in the words of `answering`. Raises ServerLost if it cannot tell."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=MODEL_DEADLINE_S)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            async with session.get(f"{url}/model_info") as reply:
                status, text = reply.status, await reply.text()
            if status == 404:  # not SGLang, but something that speaks OpenAI's language
                async with session.get(f"{url}/v1/models") as reply:
                    status, text = reply.status, await reply.text()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ServerLost(f"{url} does not answer ({error or type(error).__name__})") from None
    if status in (401, 403):
        raise ServerLost(f"{url} answered {status}: pass its --api-key")
    try:
        told = json.loads(text)
        model = told["model_path"] if "model_path" in told else told["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ServerLost(f"{url} answered {status} to the question which model it serves: {text[:200]}") from None
    return {"--model-path": real(model)}


def real(model: str) -> str:
    """One name for a local checkpoint, however it was reached."""
    return os.path.realpath(model) if os.path.isdir(model) else model
