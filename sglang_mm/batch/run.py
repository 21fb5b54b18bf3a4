"""A batch from its items to its last line: workers, a server that may end, and items that may be why."""

import asyncio
from collections import deque
from collections.abc import Coroutine

from sglang_mm.batch.args import Asked, is_near
from sglang_mm.batch.client import Client
from sglang_mm.batch.items import Item
from sglang_mm.batch.journal import Journal
from sglang_mm.batch.progress import Lines
from sglang_mm.batch.records import failed
from sglang_mm.batch.server import GivenServer, OwnServer, ServerLost
from sglang_mm.errors import SglangMMError

SETTLE_S = 5.0  # a server that failed a request may end within this time
BLAMED = "the server ended while it answered this item and no other"


class BrokenOff(SglangMMError):
    """The batch cannot go on; what is answered is kept."""


class Run:
    """items: (item, fingerprint) that are to be asked, in order.

    When an own server ends, the items that were under way are asked again, one at a time. One that was under way alone
    when the server ended again becomes an error line.
    """

    def __init__(self, asked: Asked, items: list[tuple[Item, str]], journal: Journal, told: Lines):
        self._asked, self._journal, self._told = asked, journal, told
        self._waiting = deque(items)
        self._suspects: deque[tuple[Item, str]] = deque()
        self._under_way: dict[int, tuple[Item, str]] = {}

    async def over(self, server: GivenServer | OwnServer) -> None:
        """Until every item has its line in the journal. Raises BrokenOff if the server is lost for good."""
        losses = 0
        while self._waiting or self._suspects:
            try:
                if server.log is not None:
                    self._told.say(f"starting a server; its output: {server.log}")
                await server.start()
                if not losses:
                    self._told.start()
                await self._ask(server)
            except ServerLost as lost:
                if lost.starting and not losses:
                    raise BrokenOff(str(lost)) from None
                self._sort_out()
                losses += 1
                if losses > server.restarts:
                    spent = f" Restarts are used up (--restarts {server.restarts})." if server.restarts else ""
                    raise BrokenOff(f"{lost}{spent}") from None
                self._told.say(f"{lost}\nstarting it again, {losses} of at most {server.restarts} times")
            finally:
                await server.stop()

    def _sort_out(self) -> None:
        """Items under way when a server was lost: one that was alone is to blame, several are suspects."""
        alone = self._suspects[0] if self._suspects else None
        for number, entry in sorted(self._under_way.items()):
            if entry is alone:
                self._suspects.popleft()
                self._keep(failed(*entry, "server_ended", BLAMED))
            else:
                self._suspects.append(entry)
            del self._under_way[number]

    async def _ask(self, server: GivenServer | OwnServer) -> None:
        import aiohttp

        sending, own = self._asked.send_files, isinstance(server, OwnServer)
        inline = sending == "inline" or (sending == "auto" and not is_near(server.url))
        # a connection each: the server closes idle ones, and a request on one that just closed would fail
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(headers=self._asked.headers, connector=connector) as session:
            client = Client(session, self._asked, server.url, inline=inline, settle_s=SETTLE_S if own else 0)
            await _unless_ended(self._all(client), server)

    async def _all(self, client: Client) -> None:
        while self._suspects:
            item, _ = entry = self._suspects[0]
            self._under_way[item.number] = entry
            await self._one(client, entry)
            self._suspects.popleft()
        workers = [asyncio.create_task(self._work(client)) for _ in range(self._asked.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            await _cancel(*workers)

    async def _work(self, client: Client) -> None:
        while self._waiting:
            item, _ = entry = self._waiting.popleft()
            self._under_way[item.number] = entry
            await self._one(client, entry)

    async def _one(self, client: Client, entry: tuple[Item, str]) -> None:
        self._keep(await client.answer(*entry))
        del self._under_way[entry[0].number]

    def _keep(self, record: dict) -> None:
        self._journal.add(record)
        self._told.add(record)


async def _unless_ended(work: Coroutine, server: GivenServer | OwnServer) -> None:
    """Raises ServerLost as soon as the server's process is gone."""
    working, ended = asyncio.create_task(work), asyncio.create_task(server.ended())
    try:
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServerLost(server.why())
        working.result()
    finally:
        await _cancel(working, ended)


async def _cancel(*tasks: asyncio.Task) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
