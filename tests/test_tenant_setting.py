"""What a refresh leaves in app.current_tenant_id of the calling session, and what policies make of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import ANNA, BERT, one, rows

pytestmark = pytest.mark.anyio

TABLES: LiteralString = """
    DO $$ BEGIN IF to_regrole('tenants_app') IS NULL THEN CREATE ROLE tenants_app LOGIN; END IF; END $$;
    CREATE TABLE public.sales (tenant_id uuid, v int);
    INSERT INTO public.sales VALUES
        ('11111111-1111-4111-8111-111111111111', 1), ('22222222-2222-4222-8222-222222222222', 2);
    ALTER TABLE public.sales ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
    ALTER TABLE public.sales OWNER TO listener_owner;
    GRANT SELECT ON public.sales TO listener_service, tenants_app;
    GRANT CREATE ON SCHEMA public TO listener_owner;
    GRANT USAGE ON SCHEMA listener TO tenants_app;
    GRANT EXECUTE ON FUNCTION listener.refresh(text, text), listener.find_view(text) TO tenants_app;
    GRANT SELECT ON listener.managed_view TO tenants_app;
    CREATE FUNCTION public.tenant() RETURNS uuid LANGUAGE sql STABLE
        AS $$ SELECT current_setting('app.current_tenant_id', true)::uuid $$;
"""
RAISES: LiteralString = "current_setting('app.current_tenant_id')::uuid"
CASTS: LiteralString = "current_setting('app.current_tenant_id', true)::uuid"
NULLIF: LiteralString = "NULLIF(current_setting('app.current_tenant_id', true), '')::uuid"
BY_FUNCTION: LiteralString = "public.tenant()"
READS: LiteralString = "SELECT count(*) FROM public.sales"
REFRESH: LiteralString = "SELECT listener.refresh('v', '11111111-1111-4111-8111-111111111111'::text)"
SETTING: LiteralString = "SELECT current_setting('app.current_tenant_id', true)"


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with database.connect() as connection:
        await connection.execute(TABLES)
        yield connection


async def protect(database: Database, superuser: AsyncConnection[Any], tenant: LiteralString) -> None:
    """A policy of one of the forms, and a view of the table."""
    await superuser.execute(
        sql.SQL("CREATE POLICY tenant ON public.sales USING (tenant_id = {})").format(sql.SQL(tenant))
    )
    async with database.connect("listener_migrator") as author:
        await author.execute(
            "SELECT listener.create_view('v', 'SELECT tenant_id, sum(v) AS v FROM public.sales GROUP BY 1', "
            "key_columns => '{tenant_id}', depends_on => '{}', "
            "tenants_query => 'SELECT ''11111111-1111-4111-8111-111111111111''')"
        )


@pytest.mark.parametrize("tenant", [CASTS, BY_FUNCTION, NULLIF])
@pytest.mark.parametrize("call", ["refresh", "compare", "tenants"])
async def test_a_session_that_named_no_tenant_sees_no_rows_afterwards_as_it_did_before(
    database: Database, superuser: AsyncConnection[Any], tenant: LiteralString, call: LiteralString
) -> None:
    await protect(database, superuser, tenant)
    await superuser.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA listener TO tenants_app")
    called = {
        "refresh": REFRESH,
        "compare": REFRESH.replace("refresh", "compare"),
        "tenants": "SELECT listener.tenants('v')",
    }[call]
    async with database.connect("tenants_app") as caller:
        assert await rows(caller, READS) == [(0,)]
        await caller.execute(called)
        assert await rows(caller, READS) == [(0,)]
        # One that names a tenant for a transaction sees its rows, and then none again.
        async with caller.transaction():
            await caller.execute("SELECT set_config('app.current_tenant_id', %s, true)", (BERT,))
            assert await rows(caller, READS) == [(1,)]
            await caller.execute(called)
            assert await rows(caller, READS) == [(1,)]
            assert await one(caller, SETTING) == BERT
        assert await rows(caller, READS) == [(0,)]
        await caller.execute("SELECT set_config('app.current_tenant_id', %s, false)", (ANNA,))
        await caller.execute(called)
        assert await one(caller, SETTING) == ANNA
    async with database.connect("tenants_app", autocommit=False) as caller:
        await caller.execute(called)
        assert await rows(caller, READS) == [(0,)], "in the same transaction"
        await caller.commit()
        assert await rows(caller, READS) == [(0,)], "and in the next"


async def test_a_policy_that_raises_where_no_tenant_is_named_goes_on_doing_so(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    await protect(database, superuser, RAISES)
    async with database.connect("tenants_app") as caller:
        with pytest.raises(psycopg.errors.UndefinedObject):
            await caller.execute(READS)
        await caller.execute(REFRESH)
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            await caller.execute(READS)
        assert await one(caller, SETTING) == ""


async def test_a_transaction_that_is_rolled_back_leaves_what_it_always_left(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    # What PostgreSQL does, and no function of ours can undo. The policy can: see the next test.
    await protect(database, superuser, CASTS)
    async with database.connect("tenants_app", autocommit=False) as caller:
        await caller.execute(REFRESH)
        assert await rows(caller, READS) == [(0,)]
        await caller.rollback()
        assert await one(caller, SETTING) == ""


async def test_a_session_of_the_service_knows_no_tenant_as_the_empty_text(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    await protect(database, superuser, CASTS)
    async with database.connect("listener_service") as service:
        await service.execute(REFRESH)
        assert await one(service, SETTING) == ""
    assert await rows(superuser, "SELECT v FROM public.v") == [(1,)]


@pytest.mark.parametrize("tenant", [CASTS, BY_FUNCTION])
async def test_doctor_names_a_policy_that_raises_and_the_statement_that_helps(
    database: Database, superuser: AsyncConnection[Any], tenant: LiteralString
) -> None:
    await protect(database, superuser, tenant)
    found: LiteralString = """
        SELECT level, object, mend FROM listener.row_security_findings() WHERE problem LIKE 'its policy tenant raises%'
    """
    ((level, table, mend),) = await rows(superuser, found)
    assert (level, table) == ("warning", "public.sales")
    if tenant == BY_FUNCTION:
        assert "nullif" in mend
        return
    await superuser.execute(mend)
    assert await rows(superuser, found) == []
    async with database.connect("tenants_app", autocommit=False) as caller:
        await caller.execute(REFRESH)
        await caller.rollback()
        assert await rows(caller, READS) == [(0,)]
    async with database.connect("listener_service") as service:
        await service.execute(REFRESH)
        assert await rows(service, "SELECT missing, extra, held FROM listener.compare('v', %s::text)", ANNA) == [
            (0, 0, 1)
        ]
