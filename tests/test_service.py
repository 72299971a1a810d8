"""The service beside its straight way: lost notifications, locks held elsewhere, poison, time, other replicas."""

from __future__ import annotations

import json
import uuid
from contextlib import AsyncExitStack
from typing import Any, LiteralString

import anyio
import psycopg
import pytest
from psycopg import sql

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import DEADLINE, Database, eventually, settings_for
from listener import operations, queries
from listener.connections import pool_options
from listener.errors import SetupError
from listener.refresh import Outcome
from listener.sample import create_tenants
from listener.service import Service
from listener.views import Change

pytestmark = pytest.mark.anyio

BRISK = {"retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms", "max_attempts": 2}


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
                    missed.append(await service._take_overdue())

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


async def test_poison_for_one_tenant_is_quarantined_and_mended_data_clears_it(books: Database) -> None:
    async with books.connect() as superuser, books.service(**BRISK) as running:
        await settled(books, running)
        await superuser.execute(
            """
            SET ROLE listener_owner;
            SELECT listener.create_view('shares', $q$
                SELECT tenant_id, id AS row_id, 100 / revenue_cents AS share FROM public.revenue_ledger $q$,
                '{tenant_id,row_id}', tenants_query => 'SELECT id FROM public.tenants');
            RESET ROLE;
            """
        )
        for tenant, cents in ((ANNA, 0), (BEN, 50)):
            async with transaction(books, tenant) as application:
                await book(application, tenant, cents)
        letters = "SELECT view_name, tenant, status, correlation_id, sqlstate FROM listener.dead_letter"

        async def is_quarantined() -> bool:
            return bool(await (await superuser.execute(letters)).fetchall())

        await eventually(is_quarantined)
        await running.until_refreshed("shares", BEN)
        await running.until_refreshed(LEDGER_VIEW, ANNA)
        # Tried again and again, it is still one letter.
        failed = {"view": "shares", "outcome": "failed"}
        before = value(running, "listener_refreshes_total", **failed)
        await eventually(lambda: value(running, "listener_refreshes_total", **failed) >= before + 2)
        ((view, tenant, status, correlation_id, sqlstate),) = await (await superuser.execute(letters)).fetchall()
        assert (view, tenant, status, sqlstate) == ("shares", str(ANNA), "open", "22012")
        job = await (await superuser.execute("SELECT * FROM listener.worker_failed_jobs")).fetchone()
        assert job is not None
        assert correlation_id

        # The filling may have come before the poison.
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await application.execute("UPDATE revenue_ledger SET revenue_cents = 25")
        await running.until_refreshed("shares", ANNA, after=seen)
        ((_, _, status, _, _),) = await (await superuser.execute(letters)).fetchall()
        assert status == "resolved"
        shown = await (await superuser.execute("SELECT tenant_id, share FROM shares ORDER BY 2")).fetchall()
        assert shown == [(BEN, 2), (ANNA, 4)]


async def test_a_mended_definition_resolves_the_letter(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 0)
    async with books.connect() as superuser, books.service(**BRISK) as running:
        await superuser.execute(
            """
            SET ROLE listener_owner;
            CREATE VIEW public.shares_of_all WITH (security_invoker = true) AS
                SELECT tenant_id, id AS row_id, 100 / revenue_cents AS share FROM public.revenue_ledger;
            GRANT SELECT ON public.shares_of_all TO listener_service;
            SELECT listener.create_view('shares', 'SELECT * FROM public.shares_of_all', '{tenant_id,row_id}',
                tenants_query => 'SELECT id FROM public.tenants');
            RESET ROLE;
            """
        )
        letters = "SELECT status FROM listener.dead_letter WHERE view_name = 'shares'"

        async def statuses() -> list[str]:
            return [status for (status,) in await (await superuser.execute(letters)).fetchall()]

        async def is_quarantined() -> bool:
            return await statuses() == ["open"]

        await eventually(is_quarantined)
        await superuser.execute(
            """
            CREATE OR REPLACE VIEW public.shares_of_all WITH (security_invoker = true) AS
                SELECT tenant_id, id AS row_id, (100 / nullif(revenue_cents, 0))::bigint AS share
                FROM public.revenue_ledger
            """
        )
        await running.until_refreshed("shares", ANNA)
        assert await statuses() == ["resolved"]
        shown = await (await superuser.execute("SELECT tenant_id, share FROM shares")).fetchall()
        assert shown == [(ANNA, None)]


@pytest.mark.parametrize(
    "payload", ["no json", "x" * 7999, "[1, 2]", '"text"', "{}", '{"source": 1}', "[" * 5000], ids=lambda p: p[:12]
)
async def test_a_malformed_notification_is_counted_and_stops_nothing(books: Database, payload: str) -> None:
    async with books.connect() as anybody, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        await anybody.execute("SELECT pg_notify('listener_changes', %s)", (payload,))
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        assert value(running, "listener_malformed_notifications_total") == 1
        assert await (await anybody.execute("SELECT * FROM listener.dead_letter")).fetchall() == []


async def test_a_forged_notification_refreshes_nothing(books: Database) -> None:
    async with books.connect() as anybody, books.service(sweep_interval=3600.0) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        forged = json.dumps({"tenant_id": str(BEN), "source": "public.revenue_ledger"})
        await anybody.execute("SELECT pg_notify('listener_changes', %s)", (forged,))
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        assert {change.key.tenant for change, _ in running.outcomes[seen:]} == {str(ANNA)}


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


# The refreshes of one target, each from its first write, after it got the key's lock, to before it gives it back.
RECORD_REFRESHES: LiteralString = """
    CREATE TABLE refreshed (n bigint GENERATED ALWAYS AS IDENTITY, view_id int, tenant text, during tstzrange);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO public.refreshed (view_id, tenant, during)
        SELECT NEW.view_id, NEW.tenant, tstzrange(began, clock_timestamp())
        FROM (SELECT nullif(current_setting('test.began', true), '')::timestamptz AS began) b WHERE began IS NOT NULL;
        RETURN NULL;
    END $$;
    CREATE FUNCTION begin() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM set_config('test.began', clock_timestamp()::text, true)
        WHERE coalesce(current_setting('test.began', true), '') = '';
        RETURN NULL;
    END $$;
    CREATE TRIGGER begin BEFORE INSERT OR UPDATE OR DELETE ON dashboard.mv_realtime_revenue
        FOR EACH STATEMENT EXECUTE FUNCTION begin();
    CREATE TRIGGER record AFTER INSERT OR UPDATE ON listener.refresh_state FOR EACH ROW
        WHEN (NEW.tenant <> '') EXECUTE FUNCTION record();
"""


async def test_two_replicas_share_the_work_and_every_target_is_exact(books: Database) -> None:
    tenants = [uuid.UUID(int=n) for n in range(1, 21)]
    async with books.connect("listener_app") as application:
        await create_tenants(application, [(tenant, str(tenant)) for tenant in tenants])
    async with books.connect() as superuser:
        await superuser.execute(RECORD_REFRESHES)
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
            await eventually(lambda: queries.all_fresh(superuser))
        refreshed = await (await superuser.execute("SELECT count(DISTINCT tenant) FROM refreshed")).fetchone()
        assert refreshed == (len(tenants) + 2,)
        at_once = await superuser.execute(
            "SELECT FROM refreshed a JOIN refreshed b USING (view_id, tenant) WHERE a.n < b.n AND a.during && b.during"
        )
        assert await at_once.fetchall() == []
    async with books.connect("listener_service") as service:
        names = [row["view"] for row in await queries.views(service)]
        assert [d async for _, _, d in operations.verify(service, names) if d is not None] == []


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
                assert row[2] == '"$user", public'
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
