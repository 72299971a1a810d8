"""How many connections a replica has, and that none of its parts can take another's."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack
from typing import Any

import anyio
import psycopg
import pytest
import structlog
from psycopg_pool import AsyncConnectionPool

from books import ANNA, book, open_books, settled, transaction
from conftest import DEADLINE, Database, RunningService, eventually, settings_for
from listener.connections import pool, taken
from listener.sample import create_tenants
from web_client import get, is_ready, reasons

pytestmark = pytest.mark.anyio
WORKERS = 3


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def connections(superuser: psycopg.AsyncConnection[Any]) -> int:
    """Of all that the service has to this database."""
    cursor = await superuser.execute(
        "SELECT FROM pg_stat_activity WHERE application_name LIKE 'listener%' AND datname = current_database()"
    )
    return cursor.rowcount


async def scrape(running: RunningService) -> None:
    while True:
        await get(running, "/metrics")
        await get(running, "/health/ready")


async def test_under_full_load_there_are_never_more_connections_than_the_start_said(books: Database) -> None:
    tenants = [uuid.UUID(int=n) for n in range(1, 21)]
    async with books.connect("listener_app") as application:
        await create_tenants(application, [(tenant, str(tenant)) for tenant in tenants])
    with structlog.testing.capture_logs() as said:
        async with books.connect() as superuser, books.service(workers=WORKERS, sweep_interval="20ms") as running:
            (bound,) = [line["connections"] for line in said if line["event"] == "starting"]
            assert bound == WORKERS + 4
            await settled(books, running)
            counted: list[int] = []
            async with anyio.create_task_group() as tasks, books.connect(autocommit=False) as in_the_way:
                tasks.start_soon(scrape, running)
                await in_the_way.execute("LOCK TABLE dashboard.mv_realtime_revenue IN EXCLUSIVE MODE")
                for tenant in tenants:
                    async with transaction(books, tenant) as application:
                        await book(application, tenant, 100)
                    counted.append(await connections(superuser))
                # No worker is free, and none can end.
                await eventually(lambda: running.service.workers.under_way == WORKERS)
                counted += [await connections(superuser) for _ in range(100)]
                await in_the_way.rollback()
                with anyio.fail_after(DEADLINE):
                    while not await all_shown(superuser, len(tenants)):
                        counted.append(await connections(superuser))
                tasks.cancel_scope.cancel()
    assert max(counted) <= bound
    # A refresh each, and at least one that listens and one that answers HTTP.
    assert max(counted) >= WORKERS + 2


async def all_shown(superuser: psycopg.AsyncConnection[Any], tenants: int) -> bool:
    cursor = await superuser.execute("SELECT FROM mv_realtime_revenue WHERE total_revenue = 1")
    return cursor.rowcount == tenants


async def test_readiness_and_metrics_are_answered_while_every_other_connection_is_taken(books: Database) -> None:
    async with books.connect() as superuser, books.service(workers=WORKERS, sweep_interval=3600.0) as running:
        await settled(books, running)
        await eventually(lambda: is_ready(running))
        await eventually(lambda: running.service.drainer.doorbell.state == "resting")
        async with AsyncExitStack() as taken:
            for _ in range(running.service.pool.max_size):
                await taken.enter_async_context(running.service.pool.connection())
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            assert "cannot be asked" not in await reasons(running)
            assert "\nlistener_not_ready_reasons 0.0\n" in (await get(running, "/metrics")).text
            assert await connections(superuser) == WORKERS + 4


async def test_a_connection_that_is_handed_to_somebody_who_is_cancelled_goes_back(
    sample: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(sample.url(), workers=1)
    async with pool(sample.url(), settings, pooled=False) as opened, anyio.create_task_group() as tasks:
        # All of them, and one who waits.
        mine = [await taken(opened, DEADLINE) for _ in range(settings.workers + 2)]
        waiting = anyio.CancelScope()

        async def wait() -> None:
            with waiting:
                await taken(opened, DEADLINE)

        tasks.start_soon(wait)
        await eventually(lambda: opened.get_stats().get("requests_waiting") == 1)
        add = AsyncConnectionPool._add_to_pool

        async def add_and_cancel(of: Any, connection: Any) -> None:
            await add(of, connection)
            waiting.cancel()

        monkeypatch.setattr(AsyncConnectionPool, "_add_to_pool", add_and_cancel)
        await opened.putconn(mine.pop())
        await eventually(lambda: waiting.cancelled_caught)
        monkeypatch.undo()
        mine.append(await taken(opened, DEADLINE))
        for connection in mine:
            await opened.putconn(connection)
