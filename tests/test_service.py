"""The service beside its straight way: lost notifications, locks held elsewhere, time, other replicas."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from psycopg import sql

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import DEADLINE, Database, eventually, settings_for
from listener import view_queries
from listener.connections import pool_options
from listener.errors import SetupError
from listener.refresh import Outcome
from listener.sample import create_tenants
from listener.service import Service
from listener.views import Change
from on_call import differences
from overlaps import record_refreshes, wrong_refreshes

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def test_the_sweep_brings_a_change_whose_notification_was_suppressed(books: Database) -> None:
    async with books.service(sweep_interval="300ms") as running:
        await settled(books, running)
        # While it polls, no notification is missed.
        await eventually(lambda: running.service.drainer.doorbell.state == "resting")
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await application.execute("SET LOCAL listener.notify = 'off'")
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await eventually(lambda: value(running, "listener_sweep_recovered_total") > 0)
    assert await revenue(books) == 1


async def test_the_sweep_does_not_take_a_key_for_missed_that_is_refreshed_while_it_asks(books: Database) -> None:
    async with books.connect() as superuser, books.service(sweep_interval=3600.0, workers=1) as running:
        service = running.service
        await superuser.execute("SELECT listener.set_window(%s, '0', '1 ms')", (LEDGER_VIEW,))
        await settled(books, running)
        of_the_view = {change.key for change, _ in running.outcomes if change.key.view == LEDGER_VIEW}
        keys = [key for tenant in (ANNA, BEN) for key in of_the_view if key.tenant == str(tenant)]
        seen = len(running.outcomes)
        async with books.connect(autocommit=False) as in_the_way, books.connect(autocommit=False) as slowing:
            await in_the_way.execute("LOCK TABLE dashboard.mv_realtime_revenue IN EXCLUSIVE MODE")
            for tenant in (ANNA, BEN):
                async with transaction(books, tenant) as application:
                    await book(application, tenant, 100)
            # Both are overdue: one is being refreshed, and the only worker has no time for the other.
            await eventually(lambda: service.debouncer.running_keys() & of_the_view)
            await eventually(lambda: all(key in service.debouncer for key in keys))
            # The question sees what is dirty when it begins, and then waits for this lock.
            await slowing.execute("LOCK TABLE listener.purge_mark IN ACCESS EXCLUSIVE MODE")
            missed: list[int] = []
            async with anyio.create_task_group() as tasks:

                async def ask() -> None:
                    missed.append(await service._take_dirty(overdue=True))

                async def is_asked() -> bool:
                    cursor = await superuser.execute(
                        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                        " AND query LIKE '%pending_keys%'"
                    )
                    return cursor.rowcount > 0

                tasks.start_soon(ask)
                await eventually(is_asked)
                await in_the_way.rollback()
                for tenant in (ANNA, BEN):
                    await running.until_refreshed(LEDGER_VIEW, tenant, after=seen)
                assert not any(key in service.debouncer for key in keys)
                assert missed == []
                await slowing.rollback()
        assert missed == [0]


async def test_a_key_locked_elsewhere_is_busy_and_refreshed_later(books: Database) -> None:
    async with books.service() as running, books.connect("listener_service") as elsewhere:
        await settled(books, running)
        seen = len(running.outcomes)
        async with elsewhere.transaction():
            await elsewhere.execute("SELECT listener.refresh(%s, %s::uuid)", (LEDGER_VIEW, ANNA))
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            busy = {"view": LEDGER_VIEW, "outcome": "busy"}
            await eventually(lambda: value(running, "listener_refreshes_total", **busy) > 0)
            assert value(running, "listener_lock_busy_total") > 0
            # The other views of the same tenant, whose locks are free, went on.
            await running.until_refreshed("mv_daily_revenue_summary", ANNA, after=seen)
            assert await revenue(books) is None
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert await revenue(books) == 1


async def test_a_window_changed_in_the_database_is_taken_over(books: Database) -> None:
    async with books.connect() as superuser, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        await superuser.execute(
            "SELECT listener.set_window(%s, quiet_period => '1 ms', max_wait => '7 s', edge => 'trailing')",
            (LEDGER_VIEW,),
        )
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        (window,) = {c.window for c, _ in running.outcomes[seen:] if c.key.view == LEDGER_VIEW}
        assert (window.quiet_period, window.max_wait, window.edge) == (0.001, 7, "trailing")


async def test_what_changed_while_a_view_was_paused_is_shown_as_soon_as_it_resumes(books: Database) -> None:
    async with books.connect() as superuser, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        await superuser.execute("SELECT listener.pause(%s)", (LEDGER_VIEW,))
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed("mv_daily_revenue_summary", ANNA, after=seen)
        assert await revenue(books) is None
        await superuser.execute("SELECT listener.resume(%s)", (LEDGER_VIEW,))
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert await revenue(books) == 1


async def test_a_row_leaves_the_ninety_days_at_midnight_with_no_write(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(
            """
            CREATE TABLE clock (today date);
            INSERT INTO clock VALUES ('2026-06-30');
            GRANT SELECT ON clock TO listener_service, listener_owner;
            -- The view says depends_on '{}', and a function's text shows no table: the clock is no source.
            CREATE OR REPLACE FUNCTION current_day() RETURNS date LANGUAGE sql STABLE AS 'SELECT today FROM clock';
            SELECT listener.changed_definitions();
            SELECT listener.set_window('mv_channel_performance', max_age => '100 ms');
            """
        )
        async with transaction(books) as application:
            await application.execute(
                """
                INSERT INTO attribution_allocations (tenant_id, channel_code, model_version,
                    allocated_revenue_cents, confidence_score, allocated_at)
                VALUES (%(a)s, 'email', 'v', 1, 1, '2026-04-02 12:00+00'),
                       (%(a)s, 'email', 'v', 1, 1, '2026-04-03 00:00+00')
                """,
                {"a": ANNA},
            )

        async def answer(query: LiteralString) -> list[Any]:
            return await (await superuser.execute(query)).fetchall()

        days: LiteralString = "SELECT allocation_date::text FROM mv_channel_performance ORDER BY 1"
        changes: LiteralString = "SELECT view_id, tenant, refreshed_version FROM listener.refresh_state ORDER BY 1, 2"
        async with books.service(sweep_interval="200ms") as running:
            await settled(books, running)
            assert await answer(days) == [("2026-04-02",), ("2026-04-03",)]
            before = await answer(changes)
            await superuser.execute("UPDATE clock SET today = '2026-07-01'")

            async def has_one() -> bool:
                return await answer(days) == [("2026-04-03",)]

            await running.until(has_one)
            # Nothing was marked dirty: only the age of the rows brought it.
            assert await answer(changes) == before


async def test_two_replicas_share_the_work_and_every_target_is_exact(books: Database) -> None:
    tenants = [uuid.UUID(int=n) for n in range(1, 21)]
    async with books.connect("listener_app") as application:
        await create_tenants(application, [(tenant, str(tenant)) for tenant in tenants])
    async with books.connect() as superuser:
        await record_refreshes(superuser)
        async with books.service() as one, books.service() as other:

            def both_worked() -> bool:
                return all(any(o.outcome == "refreshed" for _, o in r.outcomes) for r in (one, other))

            # Which of the two drains a change is chance: until each has had one.
            with anyio.fail_after(DEADLINE):
                while True:
                    for tenant in tenants:
                        async with transaction(books, tenant) as app:
                            await book(app, tenant, 1)
                    if both_worked():
                        break
            await eventually(lambda: view_queries.all_fresh(superuser))
        refreshed = await (await superuser.execute("SELECT count(DISTINCT tenant) FROM refreshed")).fetchone()
        assert refreshed == (len(tenants) + 2,)
        assert await wrong_refreshes(superuser) == []
    assert await differences(books) == []


async def test_what_was_dirty_before_the_start_is_refreshed(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.connect("listener_service") as service:
        await service.execute("SELECT listener.drain()")
    async with books.service(sweep_interval=3600.0) as running:
        await running.until_refreshed(LEDGER_VIEW, ANNA)
    assert await revenue(books) == 1


async def test_settings_of_a_refresh_do_not_stay_on_the_pooled_connections(books: Database) -> None:
    async with books.connect() as superuser:
        # A view computes in its own time zone, UTC; a session may have another, its role's or its server's.
        await superuser.execute(
            sql.SQL("ALTER ROLE listener_service IN DATABASE {} SET TimeZone = 'Asia/Tokyo'").format(
                sql.Identifier(books.name)
            )
        )
    async with books.service(workers=1) as running:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA)
        pool = running.service.pool
        options = pool_options(books.url(), running.service.settings)
        async with await psycopg.AsyncConnection.connect(options["conninfo"], **options["kwargs"]) as untouched:
            time_zone = untouched.info.parameter_status("TimeZone")
        for _ in range(pool.max_size):
            async with pool.connection() as connection:
                row = await (
                    await connection.execute(
                        "SELECT current_setting('app.current_tenant_id', true),"
                        " current_setting('app.execution_context', true), current_setting('search_path'),"
                        " current_setting('TimeZone')"
                    )
                ).fetchone()
                assert row is not None
                assert not row[0]
                assert not row[1]
                assert row[2] == "pg_catalog,pg_temp"
                assert row[3] == time_zone


async def test_no_refresh_begins_once_the_service_is_told_to_stop(books: Database) -> None:
    outcomes: list[Change] = []

    def stop_at_the_first(change: Change, _outcome: Outcome) -> None:
        outcomes.append(change)
        service.stop()

    # Five views wait to be filled.
    service = Service(settings_for(books.url(), workers=1), on_outcome=stop_at_the_first)
    with anyio.fail_after(DEADLINE):
        await service.run()
    assert len(outcomes) == 1


async def test_a_view_dropped_while_its_keys_wait_stops_nothing(books: Database) -> None:
    async with books.connect() as superuser, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        await superuser.execute("SELECT listener.set_window('mv_daily_revenue_summary', '1 s', '1 s', 'trailing')")
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await superuser.execute("SELECT listener.drop_view('mv_daily_revenue_summary')")
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        letters = await (await superuser.execute("SELECT * FROM listener.dead_letter")).fetchall()
        assert letters == []


async def test_a_superuser_is_refused_unless_it_is_allowed(books: Database) -> None:
    with pytest.raises(SetupError, match="superuser or has BYPASSRLS"):
        await Service(settings_for(books.url("postgres"))).run()
    async with AsyncExitStack() as opened:
        await Service(settings_for(books.url("postgres"), allow_superuser=True)).startup(opened)
