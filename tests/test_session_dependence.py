"""Rows that depend on the session that computes them: set for the computation, refused, or warned of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import one, rows
from test_settings import TABLES

pytestmark = pytest.mark.anyio

FUNCTIONS: LiteralString = """
    CREATE FUNCTION public.who() RETURNS text LANGUAGE sql STABLE AS 'SELECT session_user::text';
    CREATE FUNCTION public.who_says() RETURNS text LANGUAGE plpgsql STABLE AS 'BEGIN RETURN session_user; END';
    CREATE FUNCTION public.who_is() RETURNS text LANGUAGE sql STABLE BEGIN ATOMIC SELECT session_user::text; END;
    CREATE FUNCTION public.client() RETURNS text LANGUAGE plpgsql STABLE AS
        'BEGIN /* session_user */ RETURN inet_client_addr(); END';
    CREATE FUNCTION public.region() RETURNS text LANGUAGE sql STABLE
        AS $$ SELECT current_setting('app.region', true) $$;
    CREATE FUNCTION public.setting(name text) RETURNS text LANGUAGE sql STABLE AS 'SELECT current_setting(name, true)';
    CREATE FUNCTION public.comment() RETURNS text LANGUAGE plpgsql STABLE AS 'BEGIN -- session_user
        RETURN 1; END';
    CREATE VIEW public.nested AS SELECT tenant_id, session_user AS who FROM public.o;
    GRANT SELECT ON public.nested TO listener_service;
    ALTER VIEW public.nested OWNER TO listener_owner;
"""
REFUSED: dict[str, tuple[LiteralString, LiteralString]] = {
    "session_user": ("SELECT tenant_id, id, session_user AS who FROM public.o", "session_user"),
    "in a nested view": ("SELECT tenant_id, who FROM public.nested", "session_user"),
    "in an SQL function": ("SELECT tenant_id, public.who() FROM public.o", "session_user"),
    "in a function's parsed body": ("SELECT tenant_id, public.who_is() FROM public.o", "session_user"),
    "in a PL/pgSQL function": ("SELECT tenant_id, public.who_says() FROM public.o", "session_user"),
    "in a function of that": ("SELECT tenant_id, public.client() FROM public.o", "inet_client_addr()"),
    "a process": ("SELECT tenant_id, pg_backend_pid() FROM public.o", "pg_backend_pid()"),
    "the client's query": ("SELECT tenant_id, current_query() FROM public.o", "current_query()"),
    "a transaction": ("SELECT tenant_id, txid_current() FROM public.o", "txid_current()"),
    "application_name": ("SELECT tenant_id, current_setting('application_name') FROM public.o", "application_name"),
    "client_encoding": ("SELECT tenant_id, pg_client_encoding() FROM public.o", "pg_client_encoding()"),
    "a setting by a column": ("SELECT tenant_id, current_setting(raw, true) FROM public.o", "current_setting"),
    "a setting put together": (
        "SELECT tenant_id, current_setting('app.' || raw, true) FROM public.o",
        "current_setting",
    ),
    "in the condition": ("SELECT tenant_id, id FROM public.o WHERE raw = CURRENT_SETTING('work_mem')", "work_mem"),
    "all settings": (
        "SELECT tenant_id, (SELECT count(*) FROM pg_show_all_settings()) FROM public.o",
        "pg_show_all_settings()",
    ),
}
ALLOWED: list[LiteralString] = [
    "SELECT tenant_id, id, current_user AS who, current_schema AS home, current_catalog AS here FROM public.o",
    "SELECT tenant_id, id, current_setting('app.current_tenant_id') AS t FROM public.o",
    "SELECT tenant_id, id, current_setting('app.execution_context', true) AS c FROM public.o",
    "SELECT tenant_id, id, current_setting('DateStyle') AS d, current_setting('server_version') AS v FROM public.o",
    "SELECT tenant_id, id, 'session_user' AS word, public.comment() AS c FROM public.o",
]


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with database.connect() as connection:
        await connection.execute(TABLES)
        await connection.execute(FUNCTIONS)
        yield connection


async def register(database: Database, query: str, tenants_query: str | None = None, **settings: str) -> list[str]:
    """What a registration says, each line."""
    said: list[str] = []
    async with database.connect("listener_migrator") as author:
        author.add_notice_handler(lambda notice: said.append(f"{notice.severity}: {notice.message_primary}"))
        for name, value in settings.items():
            await author.execute("SELECT set_config(%s, %s, false)", (name.replace("__", "."), value))
        await author.execute(
            "SELECT listener.create_view('v', %s, depends_on => '{}', tenants_query => %s)", (query, tenants_query)
        )
    return said


async def test_what_differs_by_session_and_cannot_be_set_is_refused(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    for case, (query, what) in REFUSED.items():
        with pytest.raises(psycopg.Error) as refused:
            await register(database, query)
        assert refused.value.sqlstate == "LSN03", case
        assert what in (refused.value.diag.message_primary or ""), case
        assert refused.value.diag.message_hint, case
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0


async def test_inventory_does_not_propose_what_is_refused(database: Database, superuser: AsyncConnection[Any]) -> None:
    await superuser.execute(
        """
        CREATE MATERIALIZED VIEW public.stored AS SELECT tenant_id, id, public.who_says() AS who FROM public.o;
        ALTER MATERIALIZED VIEW public.stored OWNER TO listener_owner;
        """
    )
    async with database.connect("listener_service") as service:
        proposed: LiteralString = (
            "SELECT strategy, why FROM listener.proposal('public.stored', 'tenant_id', true, NULL)"
        )
        why = "its rows depend on the session that computes them: it reads session_user"
        assert await rows(service, proposed) == [("refused", why)]
    async with database.connect("listener_migrator") as migrator:
        for call in ("begin_adoption", "keep_materialized_view"):
            with pytest.raises(psycopg.Error, match="session_user"):
                await migrator.execute(
                    sql.SQL("SELECT listener.{}('public.stored', depends_on => '{{}}')").format(sql.Identifier(call))
                )


async def test_a_tenants_query_that_differs_by_session_is_refused(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    async with database.connect("listener_migrator") as author:
        with pytest.raises(psycopg.Error, match="session_user"):
            await author.execute(
                "SELECT listener.create_view('v', 'SELECT tenant_id FROM public.o', "
                "tenants_query => 'SELECT tenant_id FROM public.o WHERE raw <> session_user')"
            )
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0


async def test_what_is_the_same_for_every_session_is_taken_without_a_word(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    async with database.connect("listener_migrator") as one_caller, database.connect() as other:
        for query in ALLOWED:
            assert [line for line in await register(database, query) if "session" in line or "setting" in line] == []
            for caller in (one_caller, other):
                await caller.execute("SELECT listener.refresh('v', 't1'::text)")
                assert await rows(caller, "SELECT missing, extra, held FROM listener.compare('v', 't1'::text)") == [
                    (0, 0, 4)
                ]
            await one_caller.execute("SELECT listener.drop_view('v')")


REGIONS: dict[str, LiteralString] = {
    "in the query": "SELECT tenant_id, id, current_setting('app.region', true) AS region FROM public.o",
    "in a function": "SELECT tenant_id, id, public.region() AS region FROM public.o",
}


@pytest.mark.parametrize("where", REGIONS)
async def test_a_custom_setting_is_the_one_of_the_registration_for_every_caller(
    database: Database, superuser: AsyncConnection[Any], where: str
) -> None:
    said = await register(database, REGIONS[where], app__region="north")
    assert "NOTICE: v is computed with app.region = 'north', whatever a caller sets" in said
    shown: LiteralString = "SELECT DISTINCT region FROM public.v"
    async with database.connect("listener_migrator") as caller, database.connect("listener_service") as service:
        await caller.execute("SET app.region = 'south'")
        for session in (caller, service):
            await superuser.execute("DELETE FROM public.v")
            await session.execute("SELECT listener.refresh('v', 't1'::text)")
            assert await rows(superuser, shown) == [("north",)]
            assert await rows(session, "SELECT missing, extra FROM listener.compare('v', 't1'::text)") == [(0, 0)]
        assert await one(caller, "SELECT current_setting('app.region')") == "south"
        assert await one(service, "SELECT nullif(current_setting('app.region', true), '')") is None
        name = await one(caller, "SELECT listener.begin_alter('v', max_age => '1 hour')")
        assert (
            await one(superuser, "SELECT settings ->> 'app.region' FROM listener.managed_view WHERE name = %s", name)
            == "north"
        )
        assert await one(caller, "SELECT current_setting('app.region')") == "south"


async def test_what_an_extension_lets_sessions_set_is_the_one_of_the_registration(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute("CREATE EXTENSION pg_trgm; UPDATE public.o SET raw = 'listen' WHERE id = 1")
    await register(database, "SELECT tenant_id, id FROM public.o WHERE raw % 'listener'")
    async with database.connect("listener_migrator") as caller:
        await caller.execute("SET pg_trgm.similarity_threshold = 1")
        await caller.execute("SELECT listener.refresh('v', 't1'::text)")
        assert await rows(superuser, "SELECT id FROM public.v") == [(1,)]
        assert await one(caller, "SHOW pg_trgm.similarity_threshold") == "1"


async def test_a_policy_or_a_setting_that_nobody_can_name_is_warned_of(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """
        ALTER TABLE public.o ENABLE ROW LEVEL SECURITY;
        CREATE POLICY tenant ON public.o USING (
            tenant_id = current_setting('app.current_tenant_id', true) OR session_user = 'admin'
            OR raw = current_setting('app.region', true));
        CREATE POLICY listing ON public.o FOR SELECT TO listener_service USING (true);
        """
    )
    query = "SELECT tenant_id, id, public.setting('app.current_tenant_id') AS t FROM public.o"
    said = await register(database, query, "SELECT 't1'")
    assert "WARNING: a policy of a table that v reads may show each session other rows: it reads session_user" in said
    assert "WARNING: a function that v calls reads a setting whose name is not a constant" in said
    assert "NOTICE: v is computed with app.region = '', whatever a caller sets" in said
