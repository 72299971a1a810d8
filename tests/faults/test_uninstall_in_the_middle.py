"""`listener uninstall`, `pause` and `resume` while something is wrong: they give way, or say who is in the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from psycopg import AsyncConnection

from books import ANNA, LEDGER_VIEW, book, open_books, settled, transaction
from command import listener
from conftest import Database, RunningService, eventually

pytestmark = pytest.mark.anyio

Situation = Callable[[Database, RunningService], AbstractAsyncContextManager[None]]
BRISK = {"retry_base": "20ms", "retry_cap": "50ms", "max_attempts": 2}


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


@asynccontextmanager
async def a_target_locked(books: Database, running: RunningService) -> AsyncIterator[None]:
    """A refresh waits for somebody's lock."""
    async with books.connect(autocommit=False) as somebody, books.connect() as superuser:
        await somebody.execute("LOCK TABLE dashboard.mv_realtime_revenue IN EXCLUSIVE MODE")
        async with transaction(books) as application:
            await book(application, ANNA, 100)

        async def waits() -> bool:
            cursor = await superuser.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'listener'"
                " AND wait_event_type = 'Lock'"
            )
            return cursor.rowcount > 0

        await eventually(waits)
        yield
        await somebody.rollback()


@asynccontextmanager
async def a_drain_left_open(books: Database, running: RunningService) -> AsyncIterator[None]:
    async with books.connect("listener_service", autocommit=False) as somebody:
        await somebody.execute("SELECT count(*) FROM listener.drain()")
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        yield
        await somebody.rollback()


@asynccontextmanager
async def a_writer_that_sits_on_its_write(books: Database, running: RunningService) -> AsyncIterator[None]:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
        yield


@asynccontextmanager
async def a_quarantined_key(books: Database, running: RunningService) -> AsyncIterator[None]:
    async with books.connect() as superuser:
        await superuser.execute("ALTER TABLE dashboard.mv_realtime_revenue ADD CHECK (total_revenue <> 1)")
        async with transaction(books) as application:
            await book(application, ANNA, 100)

        async def is_quarantined() -> bool:
            return (await superuser.execute("SELECT FROM listener.dead_letter")).rowcount > 0

        await eventually(is_quarantined)
        yield


@asynccontextmanager
async def a_trigger_disabled(books: Database, running: RunningService) -> AsyncIterator[None]:
    async with books.connect() as superuser:
        await superuser.execute("ALTER TABLE revenue_ledger DISABLE TRIGGER USER")
        yield


@asynccontextmanager
async def a_target_dropped(books: Database, running: RunningService) -> AsyncIterator[None]:
    async with books.connect() as superuser:
        await superuser.execute("DROP TABLE dashboard.mv_realtime_revenue CASCADE")
        yield


SITUATIONS: list[Situation] = [
    a_target_locked, a_drain_left_open, a_writer_that_sits_on_its_write, a_quarantined_key, a_trigger_disabled,
    a_target_dropped,
]  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
async def test_pausing_and_resuming_work_in_the_middle_of_it(books: Database, situation: Situation) -> None:
    async with books.service(**BRISK) as running:
        await settled(books, running)
        async with situation(books, running):
            for command in ("pause", "resume"):
                done = await anyio.to_thread.run_sync(
                    partial(listener, command, LEDGER_VIEW, url=books.url("listener_migrator"))
                )
                assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
async def test_uninstalling_in_the_middle_of_it_gives_way_and_writes_go_on(
    books: Database, situation: Situation
) -> None:
    async with books.service(**BRISK) as running, anyio.create_task_group() as tasks:
        await settled(books, running)
        ended: list[int] = []

        async def uninstall() -> None:
            done = await anyio.to_thread.run_sync(
                partial(listener, "uninstall", "--yes", url=books.url("listener_migrator"))
            )
            ended.append(done.returncode)

        async with situation(books, running):
            tasks.start_soon(uninstall)
            async with books.connect() as superuser:
                await eventually(partial(is_at_work, superuser, ended))
            # While it waits it stands in nobody's way.
            async with transaction(books) as application:
                await book(application, ANNA, 100)
        await eventually(lambda: ended)
        assert ended == [0]
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        async with books.connect() as superuser:
            assert (await superuser.execute("SELECT FROM pg_namespace WHERE nspname = 'listener'")).rowcount == 0


async def is_at_work(superuser: AsyncConnection[Any], ended: list[int]) -> bool:
    """Whether it has asked for its locks, or is over already."""
    cursor = await superuser.execute(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'listener migrate'"
        " AND (wait_event_type = 'Lock' OR wait_event = 'PgSleep')"
    )
    return bool(ended) or cursor.rowcount > 0
