"""The connections of a replica: how many there are, and what their sessions are set to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import psycopg
from psycopg_pool import AsyncConnectionPool

from listener.database_url import session_options, with_defaults
from listener.pooler import TransactionCursor
from listener.settings import Settings

CONNECT_TIMEOUT = 10  # seconds, where the URL has none
LONGEST_PAUSE = 10.0  # seconds between two attempts to reach the database


def most(settings: Settings) -> int:
    """The most that a replica has at once: a refresh each, one to drain, one to sweep, one for HTTP, one to listen."""
    return settings.workers + 4


async def direct(url: str) -> psycopg.AsyncConnection[Any]:
    """One that belongs to no pool, and may lead through a pooler: nothing is set in its session."""
    return await psycopg.AsyncConnection.connect(
        with_defaults(url, connect_timeout=CONNECT_TIMEOUT),
        autocommit=True,
        application_name="listener",
        client_encoding="utf8",
        prepare_threshold=None,
    )


@asynccontextmanager
async def pool(url: str, settings: Settings, *, pooled: bool) -> AsyncIterator[AsyncConnectionPool]:
    """For workers, drain and sweep. Raises PoolTimeout where the database does not let it in."""
    async with _opened(pool_options(url, settings, pooled=pooled)) as opened:
        yield opened


@asynccontextmanager
async def http_pool(url: str, settings: Settings, *, pooled: bool) -> AsyncIterator[AsyncConnectionPool]:
    """For health checks and scrapes: one connection, which no worker can take from them. Raises PoolTimeout."""
    options = pool_options(url, settings, pooled=pooled) | {"min_size": 1, "max_size": 1}
    async with _opened(options) as opened:
        yield opened


@asynccontextmanager
async def _opened(options: dict[str, Any]) -> AsyncIterator[AsyncConnectionPool]:
    opened = AsyncConnectionPool(**options, open=False)
    try:
        await opened.open(wait=True)
        yield opened
    finally:
        with anyio.CancelScope(shield=True):
            await opened.close(timeout=1)


def pool_options(url: str, settings: Settings, *, pooled: bool = False) -> dict[str, Any]:
    """Arguments for the pool: one connection for each worker, one to drain, one for the sweep.

    `pooled`: a pooler stands between, and sessions are not ours to set. All three timeouts are needed to free the lock
    of a holder that died, froze, or lost its client.
    """
    session = {
        "statement_timeout": str(int(settings.statement_timeout.total_seconds() * 1000)),
        "idle_in_transaction_session_timeout": "60000",
        "client_connection_check_interval": "2000",
        # A crash that loses a refresh loses the mark "clean" with it, and the drain before it likewise.
        "synchronous_commit": "off",
    }
    if pooled:
        kwargs: dict[str, Any] = {
            "prepare_threshold": None,
            "cursor_factory": partial(TransactionCursor, settings=session),
        }
    else:
        kwargs = {"options": session_options(url, *(f"-c {name}={value}" for name, value in session.items()))}
    return {
        "conninfo": with_defaults(url, connect_timeout=CONNECT_TIMEOUT),
        "min_size": 2,
        "max_size": settings.workers + 2,
        # The pool doubles its pauses up to this, and would sleep for minutes after minutes without a server. Then it
        # gives up, and whoever asks it for a connection next has it try again.
        "reconnect_timeout": LONGEST_PAUSE,
        "kwargs": {
            "autocommit": True,
            "application_name": "listener",
            "client_encoding": "utf8",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            **kwargs,
        },
    }
