"""The service beside its straight way: lost notifications, locks held elsewhere, poison, time, other replicas."""

from __future__ import annotations

import json

import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction
from conftest import Database, RunningService, eventually, settings_for
from listener import operations, queries
from listener.errors import SetupError
from listener.service import Service

pytestmark = pytest.mark.anyio

BRISK = {"retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms", "max_attempts": 2}


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


def value(running: RunningService, metric: str, **labels: str) -> float:
    return running.service.metrics.registry.get_sample_value(metric, labels) or 0.0


async def test_the_sweep_brings_a_change_whose_notification_was_suppressed(books: Database) -> None:
    async with books.service(sweep_interval="300ms") as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await application.execute("SET LOCAL listener.notify = 'off'")
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await eventually(lambda: value(running, "listener_sweep_recovered_total") > 0)
    assert await revenue(books) == 1


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


async def test_poison_for_one_tenant_is_quarantined_and_a_mended_definition_clears_it(books: Database) -> None:
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

        async with transaction(books) as application:
            await application.execute("UPDATE revenue_ledger SET revenue_cents = 25")
        await running.until_refreshed("shares", ANNA)
        ((_, _, status, _, _),) = await (await superuser.execute(letters)).fetchall()
        assert status == "resolved"
        shown = await (await superuser.execute("SELECT tenant_id, share FROM shares ORDER BY 2")).fetchall()
        assert shown == [(BEN, 2), (ANNA, 4)]


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
            CREATE OR REPLACE FUNCTION current_day() RETURNS date LANGUAGE sql STABLE RETURN (SELECT today FROM clock);
            """
        )
        async with books.service(sweep_interval="200ms") as running:
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

            async def days() -> list[str]:
                cursor = await superuser.execute("SELECT allocation_date::text FROM mv_channel_performance ORDER BY 1")
                return [day for (day,) in await cursor.fetchall()]

            async def has_both() -> bool:
                return await days() == ["2026-04-02", "2026-04-03"]

            await running.until(has_both)
            await superuser.execute("SELECT listener.set_window('mv_channel_performance', max_age => '100 ms')")
            await superuser.execute("UPDATE clock SET today = '2026-07-01'")

            async def has_one() -> bool:
                return await days() == ["2026-04-03"]

            await running.until(has_one)


async def test_two_replicas_share_the_work_and_every_target_is_exact(books: Database) -> None:
    async with books.service() as one, books.service() as other:
        for cents in range(1, 21):
            async with transaction(books, ANNA if cents % 2 else BEN) as application:
                await book(application, ANNA if cents % 2 else BEN, cents)
        async with books.connect() as superuser:
            await eventually(lambda: queries.all_fresh(superuser))
        assert one.outcomes or other.outcomes
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
    async with books.service(workers=1) as running:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA)
        pool = running.service.pool
        for _ in range(pool.max_size):
            async with pool.connection() as connection:
                row = await (
                    await connection.execute(
                        "SELECT current_setting('app.current_tenant_id', true),"
                        " current_setting('app.execution_context', true), current_setting('search_path')"
                    )
                ).fetchone()
                assert row is not None
                assert not row[0]
                assert not row[1]
                assert row[2] == '"$user", public'


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
        await Service(settings_for(books.url("postgres"))).startup()
    service = Service(settings_for(books.url("postgres"), allow_superuser=True))
    await service.startup()
    await service.shutdown()
