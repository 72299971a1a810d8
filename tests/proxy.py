"""A proxy before the server, for faults of the network: what passes it is forwarded until a test says otherwise.

On asyncio's streams: anyio's Unix sockets, cancelled in the moment in which data comes, raise InvalidStateError.
"""

from __future__ import annotations

import asyncio
import tempfile
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psycopg.conninfo import conninfo_to_dict

# forward: all bytes pass. deaf: the connection stands and the server hears, but the client hears nothing more.
# reset: both ends are closed at once.
Mode = Literal["forward", "deaf", "reset"]
PORT = 5432


@dataclass(eq=False)
class _Connection:
    client: StreamWriter
    server: StreamWriter
    mode: Mode = "forward"

    def abort(self) -> None:
        for end in (self.client, self.server):
            end.transport.abort()

    async def pass_on(self, giver: StreamReader, taker: StreamWriter, modes: tuple[Mode, ...]) -> None:
        """What comes while the connection is in one of these modes, until either end closes."""
        try:
            while some := await giver.read(65536):
                if self.mode in modes:
                    taker.write(some)
                    await taker.drain()
        except ConnectionError:
            pass
        finally:
            self.client.close()
            self.server.close()


class Proxy:
    """Listens on a Unix socket in `directory`: connect with host=directory and port=PORT."""

    def __init__(self, server: str, directory: Path) -> None:
        self.directory = directory
        parts = conninfo_to_dict(server)
        self._host, self._port = str(parts.get("host", "localhost")), int(str(parts.get("port", PORT)))
        self._connections: set[_Connection] = set()

    def switch(self, mode: Mode) -> None:
        """For the connections that are open now; later ones are forwarded."""
        for connection in self._connections:
            connection.mode = mode
            if mode == "reset":
                connection.abort()

    async def forward(self, from_client: StreamReader, to_client: StreamWriter) -> None:
        """One connection, to its end. Where the server takes none, neither does the proxy."""
        try:
            if self._host.startswith("/"):
                from_server, to_server = await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
            else:
                from_server, to_server = await asyncio.open_connection(self._host, self._port)
        except OSError:
            to_client.transport.abort()
            return
        connection = _Connection(to_client, to_server)
        self._connections.add(connection)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connection.pass_on(from_client, to_server, ("forward", "deaf")))
            tasks.create_task(connection.pass_on(from_server, to_client, ("forward",)))
        self._connections.remove(connection)


@asynccontextmanager
async def proxy_to(server: str) -> AsyncIterator[Proxy]:
    """A proxy before the server that this URL or conninfo names."""
    # Short, and private: a socket's path may have 103 bytes.
    with tempfile.TemporaryDirectory(prefix="listener-", dir="/tmp") as directory:
        proxy = Proxy(server, Path(directory))
        async with asyncio.TaskGroup() as tasks:

            def accept(from_client: StreamReader, to_client: StreamWriter) -> None:
                tasks.create_task(proxy.forward(from_client, to_client))

            async with await asyncio.start_unix_server(accept, proxy.directory / f".s.PGSQL.{PORT}"):
                yield proxy
                proxy.switch("reset")
