"""An adopted materialized view stays as it was computed, under the database's settings, whatever the session has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import one, rows
from test_settings import HOSTILE, TABLES

pytestmark = pytest.mark.anyio

MATERIALIZED: LiteralString = """
    INSERT INTO public.o VALUES ('t2', 5, '2026-03-01 00:00+01', '03/04/2026');
    CREATE MATERIALIZED VIEW public.days AS
        SELECT tenant_id, id, raw::date AS day, at::date::text AS shown, '01/02/03'::date AS constant,
               '-1 2:03:04'::interval AS span, ARRAY['a', NULL, 'NULL']::text[] AS nulls,
               at >= '2026-03-01 00:00' AS later
        FROM public.o WHERE at <> '1890-01-01 00:00';
    CREATE UNIQUE INDEX ON public.days (tenant_id, id);
    CREATE VIEW public.on_top AS SELECT id, day FROM public.days
        WHERE day > '01/02/2001' AND span <> '-1 day +02:00' AND nulls <> '{x,NULL}' AND nulls <> ARRAY['\\'];
    ALTER MATERIALIZED VIEW public.days OWNER TO listener_owner;
    ALTER VIEW public.on_top OWNER TO listener_owner;
"""
CONTENT: LiteralString = "SELECT to_jsonb(d) FROM public.days d ORDER BY d.id"
QUERIES: LiteralString = (
    "SELECT listener.query_of('public.days'::regclass::oid), listener.query_of('public.on_top'::regclass::oid)"
)


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with database.connect() as connection:
        await connection.execute(TABLES)
        yield connection


@asynccontextmanager
async def set_up(database: Database, superuser: AsyncConnection[Any], setting: LiteralString) -> AsyncIterator[None]:
    """The materialized view, as a session computes it that has the database's settings alone."""
    if setting:
        await superuser.execute(
            sql.SQL("ALTER DATABASE {} SET {}").format(sql.Identifier(database.name), sql.SQL(setting))
        )
    async with database.connect() as plain:
        await plain.execute(MATERIALIZED.replace("\\\\", "\\"))
    yield


async def refresh_all(session: AsyncConnection[Any], name: str) -> None:
    for tenant in ("t1", "t2"):
        await session.execute("SELECT listener.refresh(%s, %s::text)", (name, tenant))
    await session.execute("SELECT listener.expand(%s)", (name,))
    await session.execute("SELECT listener.drain()")


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "DateStyle = 'SQL, DMY'",
        "DateStyle = 'German'",
        "DateStyle = 'DMY'",
        "TimeZone = 'Europe/Vienna'",
        "IntervalStyle = 'sql_standard'",
    ],
)
async def test_a_materialized_view_is_adopted_and_given_back_as_it_was_computed(
    database: Database, superuser: AsyncConnection[Any], setting: LiteralString
) -> None:
    async with set_up(database, superuser, setting), database.connect() as plain:
        before = await rows(plain, CONTENT)
        queries = await rows(plain, QUERIES)
        if not setting:
            assert [row[0]["day"] for row in before] == [
                "2003-01-02",
                "2007-05-06",
                "2009-07-08",
                "2012-10-11",
                "2026-03-04",
            ]
        async with database.connect("listener_migrator") as adopter, database.connect("listener_service") as service:
            for statement in HOSTILE.split(";"):
                await adopter.execute(statement)
            name = await one(adopter, "SELECT listener.begin_adoption('public.days')")
            await refresh_all(service, name)
            assert await rows(plain, "SELECT count(*) FROM listener.differing_tenants(%s)", name) == [(0,)]
            await adopter.execute("SELECT listener.finish_adoption(%s)", (name,))
            assert await one(plain, "SELECT relkind FROM pg_class WHERE oid = 'public.days'::regclass") == "r"
            assert await rows(plain, CONTENT) == before
            assert (await rows(plain, QUERIES))[0][1] == queries[0][1]
            assert (
                await one(
                    plain, "SELECT sum(missing + extra) FROM unnest('{t1,t2}'::text[]) t, listener.compare(%s, t)", name
                )
                == 0
            )
            assert await one(adopter, "SHOW DateStyle") == "SQL, DMY", "the adopter's own"
            await adopter.execute("SELECT listener.begin_unadoption(%s)", (name,))
            await adopter.execute("SELECT listener.fill_unadoption(%s)", (name,))
            await adopter.execute("SELECT listener.finish_unadoption(%s)", (name,))
        assert await one(plain, "SELECT relkind FROM pg_class WHERE oid = 'public.days'::regclass") == "m"
        assert await rows(plain, CONTENT) == before
        assert await rows(plain, QUERIES) == queries


async def test_a_kept_materialized_view_is_refreshed_under_the_databases_settings(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    async with set_up(database, superuser, "DateStyle = 'ISO, DMY'"), database.connect() as plain:
        before = await rows(plain, CONTENT)
        async with database.connect("listener_migrator") as keeper:
            for statement in HOSTILE.split(";"):
                await keeper.execute(statement)
            await keeper.execute("SELECT listener.keep_materialized_view('public.days')")
            await keeper.execute("SELECT listener.refresh('days', ''::text)")
            assert await rows(plain, CONTENT) == before
            # Another session writes the query as this one does: the sweep does not take it for another view.
            assert await rows(keeper, "SELECT * FROM listener.changed_definitions()") == []
            assert await one(keeper, "SELECT (listener.compare('days', ''::text)).missing") == 0


async def test_an_array_that_the_database_would_read_otherwise_is_refused(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    async with set_up(database, superuser, ""):
        await superuser.execute(
            sql.SQL("ALTER DATABASE {} SET array_nulls = off").format(sql.Identifier(database.name))
        )
        await superuser.execute(
            "CREATE MATERIALIZED VIEW public.nulls AS SELECT tenant_id, '{a,NULL}'::text[] AS x FROM public.o"
        )
        await superuser.execute("ALTER MATERIALIZED VIEW public.nulls OWNER TO listener_owner")
        for call in ("begin_adoption", "keep_materialized_view"):
            async with database.connect("listener_migrator") as adopter:
                with pytest.raises(psycopg.Error, match="array_nulls is off") as refused:
                    await adopter.execute(sql.SQL("SELECT listener.{}('public.nulls')").format(sql.Identifier(call)))
            assert refused.value.sqlstate == "LSN03"
            assert "array_nulls = on" in (refused.value.diag.message_hint or "")
        assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0
