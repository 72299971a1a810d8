"""Dashboards on a read replica: what they see of targets, when, and what cancels their queries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from books import ANNA, LEDGER_VIEW, book, open_books, transaction
from conftest import Database, eventually, server_of, settings_for
from listener.doctor import examine
from lone_server import LoneServer, lone_server
from standby import PRIMARY, standby_of

pytestmark = pytest.mark.anyio
REVENUE = "SELECT total_revenue FROM dashboard.mv_realtime_revenue WHERE tenant_id = %s"


@pytest.fixture(scope="module")
def primary() -> Iterator[LoneServer]:
    # Nothing but what the tests vacuum: what is removed cancels queries.
    with lone_server(**PRIMARY, autovacuum="off") as server:
        yield server


@pytest.fixture
async def replicated(primary: LoneServer) -> AsyncIterator[tuple[Database, Database]]:
    """A database with one tenant's books, and the same on a standby that follows it."""
    books = primary.clone()
    await open_books(books)
    with standby_of(primary.embedded) as standby:
        yield books, Database(server_of(standby), books.name)


async def shown(reader: AsyncConnection[Any]) -> object:
    """What the dashboard shows of Anna's revenue."""
    row = await (await reader.execute(REVENUE, (ANNA,))).fetchone()
    return None if row is None else row[0]


async def refreshed(books: Database, cents: int) -> None:
    """Anna earns this much more, and a service shows it on the primary."""
    async with books.service() as running:
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, cents)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)


async def setting(database: Database, name: str, value: str) -> None:
    async with database.connect() as superuser:
        await superuser.execute(f"ALTER SYSTEM SET {name} = {value}".encode())
        await superuser.execute("SELECT pg_reload_conf()")

        async def is_set() -> bool:
            row = await (await superuser.execute(f"SHOW {name}".encode())).fetchone()
            return row is not None and row[0] == value

        await eventually(is_set)


async def test_a_standby_shows_a_refreshed_target_once_it_has_replayed_it_and_not_before(
    replicated: tuple[Database, Database],
) -> None:
    books, standby = replicated
    async with standby.connect() as reader:
        await refreshed(books, 100)

        async def has(value: object) -> bool:
            return await shown(reader) == value

        await eventually(lambda: has(1))
        replayed = "SELECT pg_last_xact_replay_timestamp() > now() - interval '1 hour'"
        assert await (await reader.execute(replayed)).fetchone() == (True,)
        # Behind, it shows an older state, and a whole one.
        await reader.execute("SELECT pg_wal_replay_pause()")
        paused = "SELECT pg_get_wal_replay_pause_state() = 'paused'"

        async def stands() -> bool:
            return await (await reader.execute(paused)).fetchone() == (True,)

        await eventually(stands)
        await refreshed(books, 50)
        async with books.connect() as superuser:
            assert await shown(superuser) == 1.5
        assert await shown(reader) == 1
        await reader.execute("SELECT pg_wal_replay_resume()")
        await eventually(lambda: has(1.5))


async def test_a_dashboards_long_query_is_cancelled_by_replay_and_not_with_hot_standby_feedback(
    replicated: tuple[Database, Database],
) -> None:
    books, standby = replicated
    await refreshed(books, 100)
    await setting(standby, "max_standby_streaming_delay", "0")
    async with books.connect() as superuser, AsyncExitStack() as opened:

        async def has(reader: AsyncConnection[Any], value: object) -> bool:
            return await shown(reader) == value

        async with standby.connect() as looking:
            await eventually(lambda: has(looking, 1))
        opened.enter_context(suppress(psycopg.OperationalError))
        reader = await opened.enter_async_context(standby.connect(autocommit=False))
        await reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert await shown(reader) == 1
        await refreshed(books, 50)
        await superuser.execute("VACUUM dashboard.mv_realtime_revenue")

        async def is_cancelled() -> bool:
            try:
                await reader.execute("SELECT 1")
            except psycopg.Error as error:
                return "conflict with recovery" in str(error)
            return False

        await eventually(is_cancelled)

        # With feedback the primary keeps what the standby's oldest snapshot still sees.
        await setting(standby, "hot_standby_feedback", "on")
        patient = await opened.enter_async_context(standby.connect(autocommit=False))
        await patient.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        before = await shown(patient)

        async def is_told() -> bool:
            answer = await superuser.execute("SELECT bool_or(backend_xmin IS NOT NULL) FROM pg_stat_replication")
            return await answer.fetchone() == (True,)

        await eventually(is_told)
        await refreshed(books, 25)
        await superuser.execute("VACUUM dashboard.mv_realtime_revenue")
        async with standby.connect() as looking:
            await eventually(lambda: has(looking, 1.75))
        assert await shown(patient) == before


async def test_doctor_on_a_standby_says_so_and_checks_what_it_can(replicated: tuple[Database, Database]) -> None:
    _, standby = replicated
    found = await examine(settings_for(standby.url()))
    wrong = [f for f in found if f.level != "ok"]
    assert [(f.check, f.level, f.problem) for f in wrong] == [
        ("connection", "error", "it is a standby, and cannot be written to.")
    ]
    assert "target_session_attrs=read-write" in (wrong[0].mend or "")
    assert {"rights", "capture", "progress", "row security"} <= {f.check for f in found}
