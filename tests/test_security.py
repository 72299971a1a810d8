"""Who may not do what: tried, as each role."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors, sql

from books import ANNA, BEN, book, open_books, transaction
from conftest import Database
from listener.operations import sweep_once
from listener.refresh import Outcome

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


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO revenue_ledger (tenant_id) VALUES ('11111111-1111-4111-8111-111111111111')",
        "UPDATE revenue_ledger SET amount_cents = 0",
        "DELETE FROM attribution_allocations",
        "TRUNCATE attribution_events",
        "CREATE OR REPLACE VIEW listener.definition_1 AS SELECT 1",
        "CREATE TABLE listener.mine ()",
        "UPDATE listener.managed_view SET query = ''",
        "DROP FUNCTION listener.capture_1_insert() CASCADE",
        "SELECT listener.create_view('x', 'SELECT 1', '{tenant_id}')",
    ],
)
async def test_the_services_role_writes_no_source_and_changes_no_definition(books: Database, statement: str) -> None:
    async with books.connect("listener_service") as service, service.transaction(force_rollback=True):
        await service.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(ANNA),))
        with pytest.raises(psycopg.Error) as refused:
            await service.execute(statement.encode())
        assert refused.value.sqlstate in {"42501", "LSN03"}


async def test_the_services_role_reads_one_tenants_rows_or_none(books: Database) -> None:
    async with books.connect("listener_service") as service:
        with pytest.raises(psycopg.Error):
            await service.execute("SELECT * FROM revenue_ledger")
        await service.execute("SELECT set_config('app.current_tenant_id', %s, false)", (str(ANNA),))
        rows = await (await service.execute("SELECT DISTINCT tenant_id FROM revenue_ledger")).fetchall()
    assert rows == [(ANNA,)]


@pytest.mark.parametrize("table", ["attribution_events", "dead_events"])
async def test_a_worker_may_not_write_ingestion_whatever_it_was_granted(books: Database, table: str) -> None:
    async with books.connect() as superuser:
        await superuser.execute("SELECT set_config('app.execution_context', 'worker', false)")
        for statement in ("DELETE FROM {}", "TRUNCATE {}", "UPDATE {} SET tenant_id = tenant_id"):
            with pytest.raises(errors.InsufficientPrivilege):
                await superuser.execute(sql.SQL(statement).format(sql.Identifier(table)))


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM listener.change_log",
        "INSERT INTO listener.change_log (xid, changed_at, tenant) VALUES ('1', now(), '')",
        "UPDATE listener.dirty_key SET version = 0",
        "DELETE FROM listener.drain_log",
        "SELECT listener.drain()",
        "SELECT listener.refresh('mv_realtime_revenue', '22222222-2222-4222-8222-222222222222')",
    ],
)
async def test_the_application_touches_neither_log_nor_state_nor_refresh(books: Database, statement: str) -> None:
    async with books.connect("listener_app") as application:
        with pytest.raises(errors.InsufficientPrivilege):
            await application.execute(statement.encode())


async def test_a_reader_sees_its_own_tenant_where_the_target_has_row_level_security(books: Database) -> None:
    async with books.connect() as superuser, superuser.transaction():
        await superuser.execute("SET LOCAL ROLE listener_reader")
        assert await (await superuser.execute("SELECT * FROM mv_realtime_revenue")).fetchall() == []
        await superuser.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(BEN),))
        rows = await (await superuser.execute("SELECT tenant_id FROM mv_realtime_revenue")).fetchall()
        assert rows == [(BEN,)]


async def test_what_lies_in_public_or_pg_temp_is_not_called(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(
            """
            CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT 1/0';
            CREATE FUNCTION public.hashtextextended(text, bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 1/0';
            CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz
                LANGUAGE sql AS $$ SELECT (1/0)::text::timestamptz $$;
            GRANT TEMPORARY ON DATABASE "{name}" TO listener_app;
            """.replace("{name}", books.name).encode()
        )
    async with transaction(books) as application:
        await application.execute("CREATE TEMPORARY TABLE change_log (x int)")
        await application.execute("SET LOCAL search_path = pg_temp, public, pg_catalog")
        await book(application, ANNA, 100)
    async with books.connect("listener_service") as service:
        done = [outcome async for _, _, outcome in sweep_once(service) if outcome is not None]
    assert done
    assert {isinstance(outcome, Outcome) and outcome.outcome for outcome in done} == {"refreshed"}
