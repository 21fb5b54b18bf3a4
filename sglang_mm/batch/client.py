"""One item asked over HTTP, as often as it may be: a line of the output, or the server is lost."""

import asyncio
import json
import secrets
from dataclasses import dataclass

from sglang_mm.batch import media, records
from sglang_mm.batch.args import Asked
from sglang_mm.batch.items import Item
from sglang_mm.batch.server import ServerLost

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
CONNECT_DEADLINE_S = 30.0
TRY_AGAIN = (408, 429)  # of the 4xx: they are about the moment, not about the item
NO_ENTRY = (401, 403)


@dataclass(frozen=True)
class Failure:
    """A try that may be repeated. unreachable: nobody took the connection, which is not the item's doing."""

    code: str
    message: str
    unreachable: bool = False


class Client:
    """settle_s: least pause after a failed try, also the last: a server of our own may be about to end, which is
    noticed meanwhile, and is not the item's doing."""

    def __init__(self, session, asked: Asked, url: str, *, inline: bool, settle_s: float = 0.0):
        self._session, self._asked, self._url = session, asked, url
        self._inline, self._settle_s = inline, settle_s
        self._run = secrets.token_hex(2)  # the server may still be at a request that we no longer wait for

    async def answer(self, item: Item, fingerprint: str) -> dict:
        """A line of the output. Raises ServerLost if nobody takes connections, or the key is refused."""
        for number in range(1, self._asked.retries + 2):
            told = await self._once(item, fingerprint, number)
            if isinstance(told, dict):
                return told
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) if number <= self._asked.retries else 0
            await asyncio.sleep(max(self._settle_s, pause_s))
        if told.unreachable:
            raise ServerLost(f"{self._url} {told.message}")
        return records.failed(item, fingerprint, told.code, told.message)

    async def _once(self, item: Item, fingerprint: str, number: int) -> dict | Failure:
        import aiohttp

        try:
            body = await asyncio.to_thread(media.inline, item.body) if self._inline else item.body
        except OSError as error:
            return records.failed(item, fingerprint, "invalid_input", f"{error.filename}: {error.strerror}")
        body = body | {"rid": f"{records.request_id(item)}.{self._run}.{number}"}
        limits = aiohttp.ClientTimeout(total=self._asked.item_timeout, sock_connect=CONNECT_DEADLINE_S)
        try:
            async with self._session.post(f"{self._url}{item.url}", json=body, timeout=limits) as reply:
                status, text = reply.status, await reply.text(errors="replace")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Failure("connection", "takes no connections", unreachable=True)
        except TimeoutError:
            return Failure("timeout", f"no answer after {self._asked.item_timeout:g} s (--item-timeout)")
        except (aiohttp.ClientError, OSError) as error:
            return Failure("connection", f"the connection broke before the answer came ({type(error).__name__})")
        return self._judged(item, fingerprint, status, text)

    def _judged(self, item: Item, fingerprint: str, status: int, text: str) -> dict | Failure:
        try:
            body = json.loads(text)
        except ValueError:
            body = text[: records.SHOWN]
        if status in NO_ENTRY:
            raise ServerLost(f"{self._url} answered {status}: pass its --api-key")
        if 400 <= status < 500 and status not in TRY_AGAIN:
            return records.refused(item, fingerprint, status, body)
        if status != 200:
            return Failure("server_error", f"status {status}: {records.message_of(body)}")
        return _whole(item, fingerprint, body)


def _whole(item: Item, fingerprint: str, body: object) -> dict | Failure:
    try:
        choices = body["choices"]
        ends = [choice["finish_reason"] for choice in choices]
        if "abort" in ends:
            return Failure("aborted", "the server gave the answer up")
        return records.answered(item, fingerprint, body)
    except (LookupError, TypeError, AttributeError):
        return Failure("bad_answer", f"not an answer of OpenAI's API: {records.message_of(body)}")
