"""Silence: an answer that will never come, told from one that takes long.

A connection may stand and carry nothing, in one direction or both, and statement_timeout is the server's: whoever
waits would wait for ever. So whenever the probe of the listening connection came back, the server is asked about the
connections of the pool that have brought no byte for `probe_timeout`, by their backends' pids:

    the backend is gone                                             the end did not reach us
    it has been idle for `probe_timeout`, by the server's clock     the request or the answer was lost on the way

Those are given up, and ended at the server. A backend that is at work is left alone, and so is a slow link: bytes come.
Behind a transaction pooler nobody knows the backend's pid; a frozen process says that it is at work. For both there is
the connection's own `patience`, a little longer than the server lets a statement run.

A connection is given up by shutting its socket down: whoever waits for it meets the end of the stream, as when the
server had closed it, and does what it does for any lost connection. To cancel the task instead would leave it to every
caller to tell that from its own cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg.abc import PQGen
from psycopg.waiting import Ready

from listener import backends
from listener.pooler import is_pooled

log = structlog.get_logger("listener.silence")

Value = TypeVar("Value")


class PatientConnection(psycopg.AsyncConnection[Any]):
    """A connection that knows since when it hears nothing, and can be given up from beside."""

    patience = math.inf  # seconds that whoever waits for an answer hears nothing
    is_direct = False  # no pooler stands between: the pid that it was told is its backend's
    silent_since: float | None = None  # by the event loop's clock; None: no answer is waited for
    _timer: asyncio.TimerHandle | None = None
    _given_up: str | None = None

    async def wait(self, gen: PQGen[Value], interval: float = 0.1, timeout: float | None = None) -> Value:
        """Every wait of psycopg's, but for the connect. Raises OperationalError, with the reason, once given up."""
        if timeout is not None:  # for notifications, of which there may be none
            return await super().wait(gen, interval, timeout)
        self.silent_since = asyncio.get_running_loop().time()
        if self.patience < math.inf:
            self._look_at_the_clock()
        try:
            return await super().wait(self._noted(gen), interval)
        except psycopg.OperationalError as error:
            if self._given_up is None:
                raise
            raise psycopg.OperationalError(self._given_up) from error
        finally:
            self.silent_since = None
            if self._timer is not None:
                self._timer.cancel()

    def give_up(self, why: str) -> None:
        """Ends the connection under whoever waits for it."""
        self._given_up = why
        # Of a duplicate: libpq closes its own.
        with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.pgconn.socket)) as same:
            same.shutdown(socket.SHUT_RDWR)

    def _noted(self, gen: PQGen[Value]) -> PQGen[Value]:
        """The same, and each time that something can be read is noted."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready & Ready.R:
                    self.silent_since = asyncio.get_running_loop().time()
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Value = end.value
            return result

    def _look_at_the_clock(self) -> None:
        if self.silent_since is not None:
            loop = asyncio.get_running_loop()
            left = self.silent_since + self.patience - loop.time()
            if left > 0:
                self._timer = loop.call_later(left, self._look_at_the_clock)
            else:
                self.give_up(f"no answer within {self.patience:g} s")


def configured(patience: float) -> Callable[[PatientConnection], Awaitable[None]]:
    """For the pool: what a new connection is asked, and how long that, and whatever the pool asks, may take."""

    async def configure(connection: PatientConnection) -> None:
        connection.patience = patience
        connection.is_direct = not await is_pooled(connection)

    return configure


class InUse:
    """The connections of the pool that are in use. `timeout`, `patience`: seconds.

    `on_given_up` is told of each that is given up because the server says that no answer will come.
    """

    def __init__(self, timeout: float, patience: float, on_given_up: Callable[[], None]) -> None:
        self._timeout = timeout
        self._patience = patience
        self._on_given_up = on_given_up
        self._connections: set[PatientConnection] = set()

    @contextmanager
    def noted(self, connection: PatientConnection) -> Iterator[None]:
        """While it is in use."""
        self._connections.add(connection)
        before, connection.patience = connection.patience, self._patience
        try:
            yield
        finally:
            connection.patience = before
            self._connections.remove(connection)

    async def judge(self, listening: psycopg.AsyncConnection[Any]) -> None:
        """Asks the server, where any has been silent for so long, and gives those up that it says will stay so.

        Raises psycopg.Error.
        """
        latest = asyncio.get_running_loop().time() - self._timeout
        silent = {
            c.info.backend_pid: (c, c.silent_since)
            for c in self._connections
            if c.is_direct and c.silent_since is not None and c.silent_since <= latest
        }
        if not silent:
            return
        ended = []
        for pid, why in (await backends.unanswering(listening, list(silent), self._timeout)).items():
            connection, since = silent[pid]
            # It may have been answered while the server was asked.
            if connection in self._connections and connection.silent_since == since:
                log.warning("a connection is given up: no answer will come", backend=pid, reason=why)
                self._on_given_up()
                connection.give_up(f"no answer came: {why}")
                ended.append(pid)
        # Our end may not reach them.
        await backends.end(listening, ended)
