"""A proxy before the server, for faults of the network: what passes it is forwarded until a test says otherwise.

It knows as much of the protocol as it takes to tell one message of the server's from the next. On asyncio's streams:
anyio's Unix sockets, cancelled in the moment in which data comes, raise InvalidStateError.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import tempfile
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from psycopg.conninfo import conninfo_to_dict, make_conninfo

# forward: all bytes pass.
# deaf, mute, hole: the connection stands, and takes what is sent; but the client hears nothing more, or the server does
#   not, or neither of them. Where nothing passes, nobody hears of the other's end either.
# stuck: nothing is taken any more. Both ends wait, and what they sent arrives once it is forwarded again.
# reset: both ends are closed at once, over TCP by a reset.
# unnotified, probed: notifications are dropped, all of them, or all but probes.
# pooled: the client is told a wrong pid of its backend, as by a pooler.
Mode = Literal["forward", "deaf", "mute", "hole", "stuck", "reset", "unnotified", "probed", "pooled"]
TO_CLIENT: frozenset[Mode] = frozenset({"deaf", "hole"})  # modes in which nothing passes that way
TO_SERVER: frozenset[Mode] = frozenset({"mute", "hole"})
PORT = 5432
NOTIFICATION, BACKEND_KEY = b"A", b"K"


@dataclass
class Link:
    """What it carries, in bytes a second each way, and in pieces of so many."""

    rate: float = math.inf
    piece: int = 4096


@dataclass(eq=False)
class _Connection:
    client: StreamWriter
    server: StreamWriter
    link: Link
    mode: Mode
    switched: asyncio.Event = field(default_factory=asyncio.Event)

    def switch(self, mode: Mode) -> None:
        self.mode = mode
        self.switched.set()
        self.switched = asyncio.Event()
        if mode == "reset":
            for end in (self.client, self.server):
                if not end.is_closing():
                    whose: socket.socket = end.get_extra_info("socket")
                    whose.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.transport.abort()

    async def pass_on(self, messages: AsyncIterator[bytes], taker: StreamWriter, lost_in: frozenset[Mode]) -> None:
        """What comes, unless it is lost in the mode that the connection is in; then the end."""
        try:
            async for message in messages:
                if self.mode == "pooled" and message.startswith(BACKEND_KEY):
                    message = message[:5] + struct.pack("!I", 1) + message[9:]  # noqa: PLW2901
                for start in range(0, len(message), self.link.piece):
                    piece = message[start : start + self.link.piece]
                    await asyncio.sleep(len(piece) / self.link.rate)
                    while self.mode == "stuck":
                        await self.switched.wait()
                    if not (self.mode in lost_in or self._is_dropped(message)):
                        taker.write(piece)
                        await taker.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        while self.mode in lost_in | {"stuck"}:
            await self.switched.wait()
        self.client.close()
        self.server.close()

    def _is_dropped(self, message: bytes) -> bool:
        if not message.startswith(NOTIFICATION):
            return False
        return self.mode == "unnotified" or (self.mode == "probed" and b'"probe"' not in message)


class Proxy:
    """Listens on a Unix socket in `directory`, as port PORT, and on a TCP port of the loopback interface."""

    def __init__(self, server: str, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.link = Link()
        self.later: Mode = "forward"
        self._server = server
        parts = conninfo_to_dict(server)
        self._host, self._port = str(parts.get("host", "localhost")), int(str(parts.get("port", PORT)))
        self._connections: set[_Connection] = set()

    @property
    def url(self) -> str:
        """The server's URL, through the proxy."""
        return make_conninfo(self._server, host=str(self.directory), port=PORT)

    @property
    def tcp_url(self) -> str:
        """The same, over TCP."""
        plain = {"sslmode": "disable", "gssencmode": "disable"}  # whose answers are no messages
        return make_conninfo(self._server, host="127.0.0.1", port=self.port, **plain)

    def switch(self, mode: Mode, *, later: Mode = "forward") -> None:
        """For the connections that are open now; and for those that are opened later."""
        self.later = later
        for connection in self._connections:
            connection.switch(mode)

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
        connection = _Connection(to_client, to_server, self.link, self.later)
        self._connections.add(connection)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connection.pass_on(_as_they_come(from_client), to_server, TO_SERVER))
            tasks.create_task(connection.pass_on(_one_by_one(from_server), to_client, TO_CLIENT))
        self._connections.remove(connection)


async def _as_they_come(giver: StreamReader) -> AsyncIterator[bytes]:
    while some := await giver.read(65536):
        yield some


async def _one_by_one(giver: StreamReader) -> AsyncIterator[bytes]:
    """The server's messages: a letter, a length that counts itself, the rest."""
    while True:
        head = await giver.readexactly(5)
        (length,) = struct.unpack("!I", head[1:])
        yield head + await giver.readexactly(length - 4)


@asynccontextmanager
async def proxy_to(server: str) -> AsyncIterator[Proxy]:
    """A proxy before the server that this URL or conninfo names."""
    # Short, and private: a socket's path may have 103 bytes.
    with tempfile.TemporaryDirectory(prefix="listener-", dir="/tmp") as directory:
        proxy = Proxy(server, Path(directory))
        async with asyncio.TaskGroup() as tasks:

            def accept(from_client: StreamReader, to_client: StreamWriter) -> None:
                tasks.create_task(proxy.forward(from_client, to_client))

            over_tcp = await asyncio.start_server(accept, "127.0.0.1", 0)
            proxy.port = over_tcp.sockets[0].getsockname()[1]
            async with over_tcp, await asyncio.start_unix_server(accept, proxy.directory / f".s.PGSQL.{PORT}"):
                yield proxy
                proxy.switch("reset")
