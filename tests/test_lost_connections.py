"""Connections that are killed, or stand and carry nothing: the service replaces them, and no change is lost."""

from __future__ import annotations

import pytest
from psycopg.conninfo import make_conninfo

from books import ANNA, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import Database, eventually
from proxy import PORT, proxy_to

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def test_a_killed_listening_backend_is_replaced(books: Database) -> None:
    async with books.connect() as superuser, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        await superuser.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'listener listen' AND datname = current_database()"
        )
        await eventually(lambda: value(running, "listener_reconnects_total") > 0)
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)


async def test_a_listening_connection_that_stands_and_hears_nothing_is_replaced(books: Database) -> None:
    async with proxy_to(books.url()) as proxy:
        through_it = make_conninfo(books.url(), host=str(proxy.directory), port=PORT)
        probing = {"listen_database_url": through_it, "probe_interval": "200ms", "probe_timeout": "500ms"}
        async with books.service(sweep_interval=3600.0, **probing) as running:
            await settled(books, running)
            await eventually(lambda: running.service.listening.probe_answered)
            # While it polls, it needs no notification.
            await eventually(lambda: running.service.drainer.doorbell.state == "resting")
            seen = len(running.outcomes)
            proxy.switch("deaf")
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            # Nothing but the probe can find it out, and nothing but the new connection can bring the change.
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
            assert value(running, "listener_reconnects_total") == 1
        assert await revenue(books) == 1


async def test_killed_workers_lose_nothing(books: Database) -> None:
    async with books.connect() as superuser, books.service() as running:
        await settled(books, running)
        for cents in range(1, 6):
            seen = len(running.outcomes)
            async with transaction(books) as application:
                await book(application, ANNA, cents * 100)
            await superuser.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'listener' AND datname = current_database()"
            )
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await settled(books, running)
    assert await revenue(books) == 15
