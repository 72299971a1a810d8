"""The connections of a replica: how many there are, and what their sessions are set to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import psycopg
from psycopg_pool import AsyncConnectionPool

from listener.database_url import session_options, with_defaults
from listener.pooler import transactions_with
from listener.revisions import head
from listener.settings import Settings
from listener.silence import PatientConnection, configured

CONNECT_TIMEOUT = 10  # seconds, where the URL has none
LONGEST_PAUSE = 10.0  # seconds between two attempts to reach the database, at start
RECONNECT_PAUSE = 0.25

Pool = AsyncConnectionPool[PatientConnection]


def most(settings: Settings) -> int:
    """The most that a replica has at once: a refresh each, one to drain, one to sweep, one for HTTP, one to listen."""
    return settings.workers + 4


def pinned() -> dict[str, str]:
    """What every session, or every transaction, is set to."""
    return {
        # In `public` an application may have put functions and operators that fit a call better, and they would run as
        # the service.
        "search_path": "pg_catalog,pg_temp",
        # Queries of the catalog look dear enough to be compiled, which takes a hundred times as long as they do.
        "jit": "off",
        # What is generated, compared and noted is text that the server writes.
        "quote_all_identifiers": "off",
        "standard_conforming_strings": "on",
        "DateStyle": "ISO",
        "IntervalStyle": "postgres",
        # Which release calls; listener.check_caller() refuses one that is too old for the schema.
        "listener.migration": head(),
    }


async def direct(url: str, application_name: str = "listener") -> psycopg.AsyncConnection[Any]:
    """One that belongs to no pool, and may lead through a pooler: nothing is set in its session."""
    return await psycopg.AsyncConnection.connect(
        with_defaults(url, connect_timeout=CONNECT_TIMEOUT),
        autocommit=True,
        application_name=application_name,
        client_encoding="utf8",
        prepare_threshold=None,
        cursor_factory=transactions_with(pinned()),
    )


@asynccontextmanager
async def pool(url: str, settings: Settings, *, pooled: bool) -> AsyncIterator[Pool]:
    """For workers, drain and sweep. Raises PoolTimeout where the database does not let it in."""
    async with _opened(pool_options(url, settings, pooled=pooled)) as opened:
        yield opened


@asynccontextmanager
async def http_pool(url: str, settings: Settings, *, pooled: bool) -> AsyncIterator[Pool]:
    """For health checks and scrapes: one connection, which no worker can take from them. Raises PoolTimeout."""
    options = pool_options(url, settings, pooled=pooled) | {"min_size": 1, "max_size": 1}
    async with _opened(options) as opened:
        yield opened


@asynccontextmanager
async def _opened(options: dict[str, Any]) -> AsyncIterator[Pool]:
    opened: Pool = AsyncConnectionPool(**options, open=False, name="listener")
    try:
        await opened.open(wait=True)
        yield opened
    finally:
        with anyio.CancelScope(shield=True):
            await opened.close(timeout=1)


async def taken(pool: Pool, within: float) -> PatientConnection:
    """A connection of the pool, to be put back; had within so many seconds. Raises PoolTimeout.

    It is taken in a task that no cancellation reaches: the pool would lose a connection that it hands over to somebody
    who is cancelled in the same moment, and with it one of those that it may have.
    """
    taking = asyncio.create_task(pool.getconn(timeout=within))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(partial(_put_back, pool))
        raise


_going_back: set[asyncio.Task[None]] = set()  # the event loop keeps no task alive


def _put_back(pool: Pool, taking: asyncio.Task[PatientConnection]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        back = asyncio.create_task(pool.putconn(taking.result()))
        _going_back.add(back)
        back.add_done_callback(_going_back.discard)


def pool_options(url: str, settings: Settings, *, pooled: bool = False) -> dict[str, Any]:
    """Arguments for the pool: one connection for each worker, one to drain, one for the sweep.

    `pooled`: a pooler stands between, and sessions are not ours to set. The server's three timeouts are needed to free
    the lock of a holder that died, froze, or lost its client.
    """
    probe_timeout = settings.probe_timeout.total_seconds()
    session = pinned() | {
        "statement_timeout": str(int(settings.statement_timeout.total_seconds() * 1000)),
        "idle_in_transaction_session_timeout": "60000",
        "client_connection_check_interval": "2000",
        # A crash that loses a refresh loses the mark "clean" with it, and the drain before it likewise.
        "synchronous_commit": "off",
    }
    if pooled:
        kwargs: dict[str, Any] = {
            "prepare_threshold": None,
            "cursor_factory": transactions_with(session),
        }
    else:
        kwargs = {"options": session_options(url, session)}
    return {
        "conninfo": with_defaults(url, connect_timeout=max(2, int(probe_timeout))),
        "min_size": 2,
        "max_size": settings.workers + 2,
        "connection_class": PatientConnection,
        "configure": configured(probe_timeout),
        # A connection that could not be had is tried once more, and then given up; else the pool doubles its pauses,
        # and would come back as long after an outage as that took. As long as nothing is there it tries anew.
        "reconnect_timeout": RECONNECT_PAUSE,
        "reconnect_failed": AsyncConnectionPool.check,
        "kwargs": {
            "autocommit": True,
            "application_name": "listener",
            "client_encoding": "utf8",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": int(probe_timeout * 1000),
            **kwargs,
        },
    }
