"""PgBouncer between: everything works through it but hearing, for which a start without a direct way is refused."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.to_thread
import psycopg
import pytest
import structlog
from psycopg import sql

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction
from command import listener
from conftest import DEADLINE, Database, eventually, settings_for
from listener import operations, view_queries
from listener.doctor import examine
from listener.errors import SetupError
from listener.service import Service
from pgbouncer import pgbouncer
from web_client import is_ready

pytestmark = [pytest.mark.anyio, pytest.mark.debian]


@pytest.fixture
async def books(sample: Database) -> Database:
    """A view that shows what a refresh's session is set to, and sessions that are not so by themselves."""
    await open_books(sample)
    async with sample.connect() as superuser:
        await superuser.execute(
            """
            SET ROLE listener_owner;
            -- A query that names such a setting itself is refused: its rows depend on the session.
            CREATE FUNCTION public.of_session(name text) RETURNS text LANGUAGE sql STABLE
                AS 'SELECT pg_catalog.current_setting($1)';
            SELECT listener.create_view('sessions', $q$
                SELECT tenant_id, id AS row_id, public.of_session('transaction_isolation') AS isolation,
                       public.of_session('statement_timeout') AS longest,
                       public.of_session('synchronous_commit') AS durable,
                       public.of_session('idle_in_transaction_session_timeout') AS idle,
                       public.of_session('client_connection_check_interval') AS looks
                FROM public.revenue_ledger $q$,
                '{tenant_id,row_id}', tenants_query => 'SELECT id FROM public.tenants', depends_on => '{}');
            RESET ROLE;
            """
        )
        await superuser.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'serializable'").format(
                sql.Identifier(sample.name)
            )
        )
    return sample


async def test_all_of_it_works_through_a_transaction_pooler_with_a_direct_way_to_listen(books: Database) -> None:
    with structlog.testing.capture_logs() as said:
        async with pgbouncer(books, "transaction") as pooled:
            settings = {"database_url": pooled.url(), "listen_database_url": books.url(), "statement_timeout": "17s"}
            # A comparison has a timeout of its own, which the view of the sessions would show as a difference.
            async with books.service(sweep_interval="500ms", verify_keys=0, **settings) as running:
                await settled(books, running)
                # So often that a driver which prepares statements has done so, on whichever backend it had.
                for cents in range(1, 21):
                    seen = len(running.outcomes)
                    for tenant in (ANNA, BEN):
                        async with transaction(books, tenant) as application:
                            await book(application, tenant, cents * 100)
                    for tenant in (ANNA, BEN):
                        await running.until_refreshed(LEDGER_VIEW, tenant, after=seen)
                await settled(books, running)
                await eventually(lambda: is_ready(running))
    # What fails is tried again, and in the end on a backend that happens to fit: nothing may fail at all.
    assert [line for line in said if line["log_level"] != "info"] == []
    assert await revenue(books) == 210
    async with books.connect("listener_service") as service:
        names = [row["view"] for row in await view_queries.views(service) if row["view"] != "sessions"]
        assert [d async for _, _, d in operations.verify(service, names) if d is not None] == []
    async with books.connect() as superuser:
        cursor = await superuser.execute("SELECT DISTINCT isolation, longest, durable, idle, looks FROM sessions")
        assert await cursor.fetchall() == [("read committed", "17s", "off", "1min", "2s")]
        assert await (await superuser.execute("SELECT * FROM listener.dead_letter")).fetchall() == []


@pytest.mark.parametrize("listens_through_it", [False, True])
async def test_nothing_is_ever_heard_through_a_transaction_pooler_and_the_start_is_refused(
    books: Database, *, listens_through_it: bool
) -> None:
    # One backend for all: whoever notifies itself hears itself.
    async with pgbouncer(books, "transaction", pool_size=1) as pooled:
        given = {"listen_database_url": pooled.url()} if listens_through_it else {}
        named = "LISTENER_LISTEN_DATABASE_URL" if listens_through_it else "LISTENER_DATABASE_URL"
        refused = f"^{named} goes through a transaction pooler .* direct connection"
        with anyio.fail_after(DEADLINE), pytest.raises(SetupError, match=refused):
            await Service(settings_for(pooled.url(), probe_timeout="300ms", **given)).run()


async def test_a_session_pooler_needs_no_direct_way(books: Database) -> None:
    async with (
        pgbouncer(books, "session", pool_size=20) as pooled,
        books.service(sweep_interval=3600.0, database_url=pooled.url()) as running,
    ):
        await settled(books, running)
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await eventually(lambda: is_ready(running))


async def test_targets_are_verified_through_a_transaction_pooler(books: Database) -> None:
    async with pgbouncer(books, "transaction") as pooled, books.connect() as superuser:
        await superuser.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        async with superuser.transaction():
            await superuser.execute("SELECT listener.drop_view('sessions')")
        settings = {"database_url": pooled.url(), "listen_database_url": books.url()}
        async with books.service(sweep_interval="100ms", verify_keys=6000, **settings) as running:
            await settled(books, running)
            async with transaction(books) as application:
                await book(application, ANNA, 5)
            await settled(books, running)
            samples = running.service.metrics.registry
            await eventually(lambda: samples.get_sample_value("listener_verified_total", {"outcome": "exact"}))
            altered = sql.SQL("DELETE FROM {} WHERE tenant_id = %s").format(sql.Identifier(LEDGER_VIEW))
            await superuser.execute(altered, (ANNA,))
            await eventually(lambda: samples.get_sample_value("listener_drift_total", {"view": LEDGER_VIEW}))
            await settled(books, running)
            assert samples.get_sample_value("listener_verified_total", {"outcome": "failed"}) is None


async def test_commands_work_through_a_transaction_pooler(books: Database) -> None:
    async with pgbouncer(books, "transaction") as pooled:
        for user, *command in (
            ("listener_service", "sweep"),
            ("listener_service", "status"),
            ("listener_service", "explain", LEDGER_VIEW, "--tenant", str(ANNA)),
            ("listener_service", "verify"),
            ("listener_service", "fill", LEDGER_VIEW, "--json"),
            ("listener_migrator", "pause", LEDGER_VIEW),
            ("listener_migrator", "resume", LEDGER_VIEW),
        ):
            done = await anyio.to_thread.run_sync(partial(listener, *command, url=pooled.url(user)))
            assert (done.returncode, done.stderr) == (0, ""), command


async def test_doctor_finds_the_pooler_and_says_where_the_server_itself_is(books: Database) -> None:
    async with pgbouncer(books, "transaction") as pooled:
        found = await examine(settings_for(pooled.url(), probe_timeout="500ms"))
        wrong = [f for f in found if f.level == "error"]
        assert ["goes through a transaction pooler" in f.problem for f in wrong] == [True], wrong
        command, _, direct = (wrong[0].mend or "").partition("=")
        assert command == "export LISTENER_LISTEN_DATABASE_URL"
        assert direct == f"postgresql://listener_service@:5432/{books.name}"
        found = await examine(settings_for(pooled.url(), listen_database_url=books.url()))
        assert [f for f in found if f.level == "error"] == []
        assert "goes through a transaction pooler" in {f.problem for f in found if f.check == "connection"}
