"""A TCP port before the server, which a test opens and closes: refused, silent, full, or forwarded.

A proxy (proxy.py) is for faults of connections that stand; this is for those of connecting.
"""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal

import anyio

from conftest import Database

# refused: nobody listens. silent: the connection is accepted, and nothing is ever said. closing: it is accepted and
# closed. full: as many wait to be accepted as may, and connecting hangs. open: forwarded to the server.
Mode = Literal["refused", "silent", "closing", "full", "open"]
FILLERS = 3  # connections that wait to be accepted where one may


class Entrance:
    """A port on loopback. `attempts`: when a connection was accepted, seconds on the monotonic clock."""

    def __init__(self, database: Database, tasks: asyncio.TaskGroup) -> None:
        self.attempts: list[float] = []
        self._leads_to = database
        self._tasks = tasks
        self._mode: Mode = "refused"
        self._writers: set[StreamWriter] = set()
        self._opened = AsyncExitStack()
        self._port = 0

    def url(self, user: str = "listener_service") -> str:
        """The database, reached through here. An attempt to connect that hangs takes two seconds, libpq's least."""
        return f"postgresql://{user}@127.0.0.1:{self._port}/{self._leads_to.name}?connect_timeout=2&sslmode=disable"

    def lead_to(self, database: Database) -> None:
        """Another server's, for connections that are made from now on; those that stand are left alone."""
        self._leads_to = database

    async def switch(self, mode: Mode) -> None:
        """Breaks what is open, and is in the new mode from then on."""
        await self._opened.aclose()
        for writer in list(self._writers):
            writer.transport.abort()
        self._mode = mode
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", self._port))
        self._port = bound.getsockname()[1]
        self._opened.callback(bound.close)
        if mode == "full":
            bound.listen(0)
            for _ in range(FILLERS):
                filler = self._opened.enter_context(socket.socket())
                filler.settimeout(0)
                with suppress(BlockingIOError):
                    filler.connect(("127.0.0.1", self._port))
        elif mode != "refused":
            server = await asyncio.start_server(self._accept, sock=bound)
            self._opened.callback(server.close)

    def _accept(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        self.attempts.append(anyio.current_time())
        self._writers.add(to_client)
        if self._mode == "closing":
            to_client.transport.abort()
        elif self._mode == "open":
            self._tasks.create_task(self._forward(from_client, to_client))

    async def _forward(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_unix_connection(f"{self._leads_to.directory}/.s.PGSQL.5432")
        except OSError:
            to_client.transport.abort()
            return
        self._writers.add(to_server)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_pass_on(from_client, to_server))
            tasks.create_task(_pass_on(from_server, to_client))


async def _pass_on(giver: StreamReader, taker: StreamWriter) -> None:
    with suppress(ConnectionError):
        while some := await giver.read(65536):
            taker.write(some)
            await taker.drain()
    taker.close()


@asynccontextmanager
async def entrance_to(database: Database) -> AsyncIterator[Entrance]:
    """A port before the database's server, at first one at which nobody listens."""
    async with asyncio.TaskGroup() as tasks:
        entrance = Entrance(database, tasks)
        await entrance.switch("refused")
        try:
            yield entrance
        finally:
            await entrance.switch("refused")
            await entrance._opened.aclose()
