"""Who may not do what: tried, as each role."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors, sql

from books import ANNA, BEN, book, open_books, transaction
from conftest import Database
from listener.operations import sweep_once

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 100)
    async with sample.connect("listener_service") as service:
        async for _ in sweep_once(service):
            pass
    return sample


async def allowed(books: Database, role: str, statements: list[str]) -> list[tuple[str, str | None]]:
    """Those that are not refused to the role, at work for Anna, for want of a right; and what else was said."""
    found: list[tuple[str, str | None]] = []
    async with books.connect(role) as connection:
        for statement in statements:
            try:
                async with connection.transaction(force_rollback=True):
                    await connection.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(ANNA),))
                    await connection.execute(statement.encode())
            except psycopg.Error as error:
                if error.sqlstate not in {"42501", "LSN03"}:
                    found.append((statement, str(error)))
            else:
                found.append((statement, None))
    return found


NOT_THE_SERVICES = [
    "INSERT INTO revenue_ledger (tenant_id) VALUES ('11111111-1111-4111-8111-111111111111')",
    "UPDATE revenue_ledger SET amount_cents = 0",
    "DELETE FROM attribution_allocations",
    "TRUNCATE attribution_events",
    "CREATE OR REPLACE VIEW listener.definition_1 AS SELECT 1",
    "CREATE TABLE listener.mine ()",
    "UPDATE listener.managed_view SET query = ''",
    "DROP FUNCTION listener.capture_1_insert() CASCADE",
    "SELECT listener.create_view('x', 'SELECT 1', '{tenant_id}')",
    "SELECT listener.drop_view('mv_realtime_revenue')",
    "SELECT listener.set_window('mv_realtime_revenue', '1 h', '1 h')",
    "SELECT listener.pause()",
    "SELECT listener.add_source('revenue_ledger', 'id')",
    "SELECT listener.set_notify('never')",
    "SELECT listener.uninstall()",
    "SELECT listener.regenerate()",
    "SET ROLE listener_owner",
    "UPDATE listener.installation SET service_role = 'postgres'",
    "UPDATE listener.source SET tenant_column = 'id'",
    "DELETE FROM listener.view_source",
    "INSERT INTO listener.alembic_version VALUES ('9999')",
    "ALTER TABLE revenue_ledger DISABLE TRIGGER ALL",
    "ALTER TABLE dashboard.mv_realtime_revenue DISABLE ROW LEVEL SECURITY",
    "CREATE POLICY mine ON dashboard.mv_realtime_revenue USING (true)",
    "DROP TABLE dashboard.mv_realtime_revenue",
    "TRUNCATE dashboard.mv_realtime_revenue",
    "CREATE TABLE dashboard.mine ()",
    "INSERT INTO dashboard.mv_realtime_revenue (tenant_id) VALUES ('22222222-2222-4222-8222-222222222222')",
    "UPDATE dashboard.mv_realtime_revenue SET tenant_id = '22222222-2222-4222-8222-222222222222'",
]


async def test_the_services_role_writes_no_source_and_changes_no_definition(books: Database) -> None:
    assert await allowed(books, "listener_service", NOT_THE_SERVICES) == []


async def test_the_services_role_reads_one_tenants_rows_or_none(books: Database) -> None:
    async with books.connect("listener_service") as service:
        with pytest.raises(psycopg.Error):
            await service.execute("SELECT * FROM revenue_ledger")
        await service.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(ANNA),))
        rows = await (await service.execute("SELECT DISTINCT tenant_id FROM revenue_ledger")).fetchall()
    assert rows == [(ANNA,)]


async def test_the_services_role_writes_no_other_tenants_rows_of_a_target(books: Database) -> None:
    async with books.connect("listener_service") as service, service.transaction(force_rollback=True):
        await service.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(ANNA),))
        for statement in (
            "UPDATE dashboard.mv_realtime_revenue SET total_revenue = 0 RETURNING tenant_id",
            "DELETE FROM dashboard.mv_realtime_revenue RETURNING tenant_id",
        ):
            assert await (await service.execute(statement.encode())).fetchall() == [(ANNA,)]


@pytest.mark.parametrize("table", ["attribution_events", "dead_events"])
async def test_a_worker_may_not_write_ingestion_whatever_it_was_granted(books: Database, table: str) -> None:
    async with books.connect() as superuser:
        await superuser.execute("SELECT set_config('app.execution_context', 'worker', false)")
        for statement in ("DELETE FROM {}", "TRUNCATE {}", "UPDATE {} SET tenant_id = tenant_id"):
            with pytest.raises(errors.InsufficientPrivilege):
                await superuser.execute(sql.SQL(statement).format(sql.Identifier(table)))


NOT_THE_APPLICATIONS = [
    "SELECT * FROM listener.change_log",
    "INSERT INTO listener.change_log (xid, changed_at, tenant) VALUES ('1', now(), '')",
    "UPDATE listener.dirty_key SET version = 0",
    "DELETE FROM listener.drain_log",
    "SELECT listener.drain()",
    "SELECT listener.refresh('mv_realtime_revenue', '22222222-2222-4222-8222-222222222222')",
    "DELETE FROM listener.refresh_state",
    "DELETE FROM listener.dead_letter",
    "INSERT INTO listener.moved_tenant VALUES ('1', 1, '')",
    "SELECT setval('listener.doorbell', 9000000000000)",
    "SELECT * FROM listener.freshness",
    "SELECT * FROM listener.worker_failed_jobs",
    "SELECT listener.expand('mv_realtime_revenue')",
    "SELECT listener.purge()",
    "SELECT listener.end_lease()",
    "SELECT listener.record_refusal('v', 't', 'm', NULL, 'w')",
    "SELECT listener.mark_all_dirty(1)",
    "CREATE TEMPORARY TABLE t (); CREATE TRIGGER t AFTER INSERT ON t EXECUTE FUNCTION listener.capture_1_truncate()",
    "INSERT INTO dashboard.mv_realtime_revenue (tenant_id) VALUES ('11111111-1111-4111-8111-111111111111')",
    "SELECT * FROM dashboard.mv_realtime_revenue",
    "SELECT * FROM mv_reconciliation_status",
    "SET ROLE listener_service",
]


async def test_the_application_touches_neither_log_nor_state_nor_refresh(books: Database) -> None:
    assert await allowed(books, "listener_app", NOT_THE_APPLICATIONS) == []
    # Nor where somebody lets it into the schema, to read `freshness` say.
    async with books.connect() as superuser:
        await superuser.execute("GRANT USAGE ON SCHEMA listener, dashboard TO listener_app")
    assert await allowed(books, "listener_app", NOT_THE_APPLICATIONS) == []


async def test_an_application_that_is_granted_refresh_learns_how_many_rows_changed_and_nothing_else(
    books: Database,
) -> None:
    async with books.connect() as superuser:
        await superuser.execute("GRANT USAGE ON SCHEMA listener TO listener_app")
        await superuser.execute("GRANT EXECUTE ON FUNCTION listener.refresh(text, text) TO listener_app")
    async with transaction(books, BEN) as application:
        await book(application, BEN, 50)
    async with transaction(books) as application:
        cursor = await application.execute(
            "SELECT * FROM listener.refresh('mv_realtime_revenue', %s::text)", (str(BEN),)
        )
        assert [column.name for column in cursor.description or ()] == [
            "outcome",
            "inserted",
            "updated",
            "deleted",
            "version",
            "duration",
        ]
        assert (await cursor.fetchone() or ())[:4] == ("refreshed", 0, 1, 0)
        # It is still at work for its own tenant, and has the rights that it had.
        cursor = await application.execute("SELECT current_user, current_setting('app.current_tenant_id')")
        assert await cursor.fetchone() == ("listener_app", str(ANNA))
        cursor = await application.execute("SELECT DISTINCT tenant_id FROM revenue_ledger")
        assert await cursor.fetchall() == [(ANNA,)]
    for statement in (
        "SELECT * FROM listener.refresh_state",
        "SELECT listener.drain()",
        "TABLE dashboard.mv_realtime_revenue",
    ):
        async with books.connect("listener_app") as application:
            with pytest.raises(errors.InsufficientPrivilege):
                await application.execute(statement.encode())


async def test_a_reader_writes_no_target(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute("CREATE ROLE reads_dashboards LOGIN IN ROLE listener_reader")
        try:
            statements = ["DELETE FROM {}", "UPDATE {} SET total_revenue = 0", "TRUNCATE {}", "DROP TABLE {}"]
            targets = [statement.format("dashboard.mv_realtime_revenue") for statement in statements]
            assert await allowed(books, "reads_dashboards", targets) == []
        finally:
            await superuser.execute("DROP ROLE reads_dashboards")


async def test_a_reader_sees_its_own_tenant_where_the_target_has_row_level_security(books: Database) -> None:
    async with books.connect() as superuser, superuser.transaction():
        await superuser.execute("SET LOCAL ROLE listener_reader")
        assert await (await superuser.execute("SELECT * FROM mv_realtime_revenue")).fetchall() == []
        await superuser.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(BEN),))
        rows = await (await superuser.execute("SELECT tenant_id FROM mv_realtime_revenue")).fetchall()
        assert rows == [(BEN,)]


async def test_every_function_of_ours_has_a_pinned_path_where_it_lends_rights_and_none_is_for_everybody(
    books: Database,
) -> None:
    async with books.connect() as superuser:
        # So that every kind of generated function is there: look-ups, partitions of another order.
        await superuser.execute(
            """
            SET ROLE listener_owner;
            CREATE TABLE letters (id bigint PRIMARY KEY, tenant_id uuid) PARTITION BY RANGE (id);
            CREATE TABLE old_letters (tenant_id uuid, id bigint NOT NULL);
            ALTER TABLE letters ATTACH PARTITION old_letters FOR VALUES FROM (0) TO (100);
            CREATE TABLE notes (id bigint, letter_id bigint REFERENCES letters);
            SELECT listener.add_source('notes', through => 'letters');
            RESET ROLE;
            """
        )
        cursor = await superuser.execute(
            """
            SELECT p.oid::regprocedure::text, p.prorettype = 'trigger'::regtype, p.prosecdef,
                   'search_path=pg_catalog, pg_temp' = ANY (coalesce(p.proconfig, '{}')),
                   EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                           WHERE a.grantee = 0),
                   o.rolsuper
            FROM pg_proc p JOIN pg_roles o ON o.oid = p.proowner WHERE p.pronamespace = 'listener'::regnamespace
            """
        )
        functions = await cursor.fetchall()
        cursor = await superuser.execute(
            """
            SELECT c.oid::regclass::text FROM pg_class c
            CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault(
                CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))) a
            WHERE c.relnamespace = 'listener'::regnamespace AND a.grantee = 0
            """
        )
        assert await cursor.fetchall() == []
    triggers = [name for name, is_trigger, *_ in functions if is_trigger]
    assert {name.rpartition("_")[2] for name in triggers} == {
        "insert()",
        "update()",
        "delete()",
        "truncate()",
        "row()",
        "name()",
        "watch()",
        "moved()",
    }
    assert len(triggers) >= 60
    # All triggers write with the owner's rights.
    assert [name for name, is_trigger, definer, *_ in functions if is_trigger and not definer] == []
    # Each calls one function, in which the path is pinned, and gives the caller's path back.
    known = {
        "listener.check_drift(text,text)",
        "listener.refresh(text,text)",
        "listener.refresh_all_for_tenant(text)",
    }
    assert {name for name, _, definer, pinned, _, _ in functions if definer and not pinned} == known
    assert [name for name, *_, is_open, _ in functions if is_open] == []
    assert [name for name, *_, by_superuser in functions if by_superuser] == []
