"""Replicas as processes: killed, stopped and woken, added and removed while an application writes; nothing is lost.

Each replica connects as a role of its own, so that the server can tell which of them a backend works for.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import sql

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, transaction
from conftest import Database, eventually
from gates import FIRST, close, create_slow_view, open_gate
from listener import view_queries
from on_call import differences, open_letters
from overlaps import record_refreshes, wrong_refreshes
from process import ServiceProcess, service_process

pytestmark = pytest.mark.anyio

ROLES = tuple(f"listener_replica_{number}" for number in range(1, 6))
# Soon overdue, soon swept up.
BRISK = {"sweep_interval": "300ms", "retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms"}


@pytest.fixture
async def superuser(sample: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A database with two tenants, roles for the replicas, and records of what no replica may do."""
    await open_books(sample)
    async with sample.connect() as connection:
        for role in ROLES:
            if (await connection.execute("SELECT to_regrole(%s)", (role,))).rowcount:
                await connection.execute(
                    sql.SQL(
                        "DO $$ BEGIN CREATE ROLE {0} LOGIN IN ROLE listener_service;"
                        " EXCEPTION WHEN duplicate_object THEN NULL; END $$"
                    ).format(sql.Identifier(role))
                )
        await record_refreshes(connection)
        # Overdue a moment later.
        await connection.execute("SELECT listener.set_window(name, '100 ms', '300 ms') FROM listener.managed_view")
        yield connection


@asynccontextmanager
async def replicas(
    sample: Database, roles: Sequence[str] = ROLES[:3], **settings: str
) -> AsyncIterator[dict[str, ServiceProcess]]:
    """One for each role, all of them serving."""
    async with AsyncExitStack() as opened:
        running = {
            role: await opened.enter_async_context(service_process(sample.url(role), **BRISK | settings))
            for role in roles
        }
        for replica in running.values():
            await replica.until("serving")
        yield running


async def write(sample: Database, tenant: Any, cents: int) -> None:
    async with transaction(sample, tenant) as application:
        await book(application, tenant, cents)


async def define_slow(superuser: psycopg.AsyncConnection[Any]) -> None:
    """A view whose refresh is slow for as long as the test says, and a record of what was taken back."""
    await create_slow_view(superuser)
    await superuser.execute(
        """
        SELECT listener.set_window('slow', '50 ms', '200 ms');
        CREATE TABLE shrank (n bigint);
        GRANT INSERT ON shrank TO listener_service;
        -- Rows are only ever added: less than was shown is what somebody computed from rows that he had read earlier.
        CREATE FUNCTION shrank() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO public.shrank VALUES (NEW.cents);
            RETURN NULL;
        END $$;
        CREATE TRIGGER shrank AFTER UPDATE ON slow FOR EACH ROW WHEN (NEW.cents < OLD.cents)
            EXECUTE FUNCTION shrank();
        """
    )


async def waiting_in(superuser: psycopg.AsyncConnection[Any], query: str) -> tuple[str, int] | None:
    """Which replica's backend waits for a lock in this query, and its pid."""
    cursor = await superuser.execute(
        """
        SELECT usename::text, pid FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%%' || %s || '%%'
        """,
        (query,),
    )
    return await cursor.fetchone()


async def until_waiting_in(
    superuser: psycopg.AsyncConnection[Any], query: str, *, other_than: str = ""
) -> tuple[str, int]:
    """The first replica, other than this one, that waits for a lock in this query."""
    found: list[tuple[str, int]] = []

    async def somebody_waits() -> bool:
        waiting = await waiting_in(superuser, query)
        if waiting is not None and waiting[0] != other_than:
            found.append(waiting)
        return bool(found)

    await eventually(somebody_waits)
    return found[0]


async def until_shown(superuser: psycopg.AsyncConnection[Any], cents: int, tenant: Any = BEN) -> None:
    """Until `slow` shows so much."""

    async def is_shown() -> bool:
        cursor = await superuser.execute("SELECT cents FROM slow WHERE tenant_id = %s", (tenant,))
        return await cursor.fetchone() == (cents,)

    await eventually(is_shown)


async def all_is_well(sample: Database, superuser: psycopg.AsyncConnection[Any]) -> None:
    """Everything is shown, every target is exact, and nothing was done twice at once or taken back."""
    await eventually(lambda: view_queries.all_fresh(superuser))
    assert await differences(sample) == []
    assert await wrong_refreshes(superuser) == []
    assert await open_letters(superuser) == []


async def test_a_key_whose_replica_is_killed_in_mid_refresh_is_finished_by_another(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    await define_slow(superuser)
    async with replicas(sample) as running, sample.connect() as holder:
        await eventually(lambda: view_queries.all_fresh(superuser))
        await close(holder, FIRST)
        await write(sample, BEN, 300)
        killed, _ = await until_waiting_in(superuser, "listener.refresh")
        assert await running[killed].end(signal.SIGKILL) == -signal.SIGKILL
        # The server sees that its client is gone, and gives the key's lock back; the refresh still cannot be finished.
        await until_waiting_in(superuser, "listener.refresh", other_than=killed)
        await open_gate(holder, FIRST)
        await until_shown(superuser, 300)
        await all_is_well(sample, superuser)


async def test_a_key_whose_replica_is_stopped_in_mid_refresh_is_finished_by_another(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    await define_slow(superuser)
    # Time enough to stop it, and to do it soon.
    async with replicas(sample, statement_timeout="2s") as running, sample.connect() as holder:
        await eventually(lambda: view_queries.all_fresh(superuser))
        await close(holder, FIRST)
        await write(sample, BEN, 300)
        stopped, _ = await until_waiting_in(superuser, "listener.refresh")
        running[stopped].send(signal.SIGSTOP)
        await until_waiting_in(superuser, "listener.refresh", other_than=stopped)
        await write(sample, BEN, 30)
        await open_gate(holder, FIRST)
        await until_shown(superuser, 330)
        before = len(running[stopped].log)
        running[stopped].send(signal.SIGCONT)
        # It finds that its refresh was cancelled, records that, and makes it good.
        await running[stopped].until("refresh failed", view="slow", after=before)
        await all_is_well(sample, superuser)
        assert (await superuser.execute("SELECT FROM shrank")).rowcount == 0


async def test_a_replica_that_wakes_with_an_old_version_of_a_key_leaves_it_as_it_is(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute("SELECT listener.set_window(%s, '2 s', '2 s', 'trailing')", (LEDGER_VIEW,))
    async with replicas(sample) as running:
        await eventually(lambda: view_queries.all_fresh(superuser))
        known = {role: len(replica.log) for role, replica in running.items()}
        drainers: list[str] = []
        await write(sample, ANNA, 100)

        def is_drained() -> bool:
            drainers[:] = [
                role
                for role, replica in running.items()
                if any(
                    f"{LEDGER_VIEW}/{ANNA}" in line["named"] for line in replica.logged("drained", after=known[role])
                )
            ]
            return bool(drainers)

        await eventually(is_drained)
        stopped = drainers[0]
        running[stopped].send(signal.SIGSTOP)
        assert not running[stopped].logged("refreshed", view=LEDGER_VIEW, tenant_id=str(ANNA), after=known[stopped]), (
            "it was stopped too late"
        )
        await write(sample, ANNA, 50)

        async def is_shown() -> bool:
            return await revenue(sample) == 1.5

        await eventually(is_shown)
        before = len(running[stopped].log)
        running[stopped].send(signal.SIGCONT)
        await running[stopped].until("fresh", view=LEDGER_VIEW, tenant_id=str(ANNA), after=before)
        await all_is_well(sample, superuser)


async def test_a_drain_whose_replica_is_killed_is_done_by_another(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    async with replicas(sample) as running, sample.connect(autocommit=False) as in_the_way:
        await eventually(lambda: view_queries.all_fresh(superuser))
        await in_the_way.execute("LOCK TABLE listener.dirty_key IN SHARE MODE")
        await write(sample, BEN, 300)
        killed, _ = await until_waiting_in(superuser, "listener.drain()")
        assert await running[killed].end(signal.SIGKILL) == -signal.SIGKILL
        # One drainer at a time: this one has the lock that the other had.
        await until_waiting_in(superuser, "listener.drain()", other_than=killed)
        await in_the_way.rollback()

        async def is_shown() -> bool:
            return await revenue(sample, BEN) == 3

        await eventually(is_shown)
        await all_is_well(sample, superuser)


async def test_a_replica_that_is_stopped_before_it_read_a_long_answer_keeps_no_other_from_draining(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    keys = 20_000
    await superuser.execute(
        """
        SET ROLE listener_owner;
        CREATE TABLE visits (tenant_id bigint NOT NULL);
        CREATE INDEX ON visits (tenant_id);
        GRANT SELECT ON visits TO listener_service;
        SELECT listener.create_view('many', 'SELECT tenant_id, count(*) AS n FROM visits GROUP BY 1', '{tenant_id}',
            tenants_query => 'SELECT NULL::bigint WHERE false');
        -- Its keys are drained like any other's, and then nobody has to refresh them.
        SELECT listener.pause('many');
        RESET ROLE;
        """
    )
    first, second = ROLES[:2]
    async with replicas(sample, (first, second)) as running, sample.connect(autocommit=False) as in_the_way:

        async def is_idle() -> bool:
            cursor = await superuser.execute(
                "SELECT FROM pg_stat_activity WHERE usename = %s AND datname = current_database()"
                " AND state <> 'idle'", (first,)
            )  # fmt: skip
            return cursor.rowcount == 0

        await until_fresh_but_for(superuser, "many")
        running[second].send(signal.SIGSTOP)
        await in_the_way.execute("LOCK TABLE listener.dirty_key IN SHARE MODE")
        await superuser.execute("INSERT INTO visits SELECT generate_series(1, %s)", (keys,))
        _, drainer = await until_waiting_in(superuser, "listener.drain()")
        running[first].send(signal.SIGSTOP)
        running[second].send(signal.SIGCONT)
        await in_the_way.rollback()

        async def has_answered() -> bool:
            cursor = await superuser.execute(
                "SELECT wait_event FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Client'", (drainer,)
            )
            return cursor.rowcount == 1

        # All of it, or what the socket holds of it.
        await eventually(has_answered)
        await write(sample, BEN, 300)

        async def is_shown() -> bool:
            return await revenue(sample, BEN) == 3

        await eventually(is_shown)
        dirty = await (
            await superuser.execute(
                "SELECT count(*) FROM listener.dirty d JOIN listener.managed_view v ON v.id = d.view_id"
                " WHERE v.name = 'many' AND d.tenant <> ''"
            )
        ).fetchone()
        assert dirty == (keys,)
        # Whatever came of its answer: alone, it goes on.
        running[first].send(signal.SIGCONT)
        assert await running[second].end(signal.SIGKILL) == -signal.SIGKILL
        await write(sample, BEN, 400)

        async def is_shown_by_the_first() -> bool:
            return await revenue(sample, BEN) == 7

        await eventually(is_shown_by_the_first)


async def until_fresh_but_for(superuser: psycopg.AsyncConnection[Any], view: str) -> None:
    """Until nothing is dirty in any view but this one."""

    async def is_fresh() -> bool:
        cursor = await superuser.execute(
            "SELECT FROM listener.dirty d JOIN listener.managed_view v ON v.id = d.view_id WHERE v.name <> %s"
            " UNION ALL SELECT FROM listener.unconsumed()", (view,)
        )  # fmt: skip
        return cursor.rowcount == 0

    await eventually(is_fresh)


async def test_replicas_come_and_go_under_load_and_nothing_is_lost_or_done_twice_at_once(
    sample: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    written = {ANNA: 0, BEN: 0}
    over = anyio.Event()

    async def keep_writing(tenant: Any) -> None:
        async with sample.connect("listener_app") as application:
            await application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(tenant),))
            for cents in count(1):
                if over.is_set():
                    return
                await book(application, tenant, cents)
                written[tenant] += cents
                # The pace of the load, and nothing that is waited for: as fast as it can, it would be all that runs.
                await anyio.sleep(0.02)

    async def one_more() -> None:
        """Until another write of each tenant was shown."""
        for tenant in written:
            shown = await revenue(sample, tenant)

            async def is_more(tenant: Any = tenant, shown: float | None = shown) -> bool:
                return await revenue(sample, tenant) != shown

            await eventually(is_more)

    async with replicas(sample, ROLES[:2]) as running, anyio.create_task_group() as writers:
        for tenant in written:
            writers.start_soon(keep_writing, tenant)
        killed, ended = running.values()
        await one_more()
        async with replicas(sample, ROLES[2:4]) as added:
            await one_more()
            assert await killed.end(signal.SIGKILL) == -signal.SIGKILL
            await one_more()
            assert await ended.end() == 0
            await one_more()
            over.set()
            await all_is_well(sample, superuser)
            assert any(replica.logged("refreshed", view=LEDGER_VIEW) for replica in added.values())
    for tenant, cents in written.items():
        assert await revenue(sample, tenant) == cents / 100
