"""A view's rows depend on the settings of its registration, and on nothing that a caller has set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import one, rows

pytestmark = pytest.mark.anyio

TABLES: LiteralString = """
    CREATE TABLE public.o (tenant_id text, id int, at timestamptz, raw text, words text);
    INSERT INTO public.o VALUES
        ('t1', 1, '2026-02-28 23:30+00', '01/02/03', 'the dogs'), ('t1', 2, '2026-03-01 00:30+00', '05/06/07', NULL),
        ('t1', 3, '2014-10-25 21:30+00', '07/08/09', 'runs'), ('t1', 4, '2014-10-25 22:30+00', '10/11/12', 'running');
    GRANT SELECT ON public.o TO listener_service;
    GRANT CREATE ON SCHEMA public TO listener_owner;
    ALTER TABLE public.o OWNER TO listener_owner;
"""
# A column for each setting that reaches a result.
QUERY: LiteralString = """
    SELECT tenant_id, id, raw::date AS day, at::text AS at_text, at::date::text AS day_text,
           '01/02/03'::date AS constant, at >= '01/03/2026 00:00' AS later, tstzrange(at, NULL) AS range,
           ARRAY[at, at] AS times, ROW(at, raw)::text AS pair,
           interval '1 month 2 days -3 hours' AS span, (interval '1 month 2 days -3 hours')::text AS span_text,
           interval '-1 2:03:04' AS signed, ARRAY['a', NULL, 'NULL']::text[]::text::text[] AS nulls,
           '{b,NULL}'::text[] AS read_nulls, ARRAY[NULL, 'NULL', raw] AS texts, quote_ident('plain') AS quoted,
           to_tsvector(words)::text AS lexemes, (0.1::float8 + 0.2)::text AS float, '\\x01'::bytea::text AS bytes,
           current_setting('lc_monetary') AS money, current_setting('lc_numeric') AS numbers,
           current_setting('lc_time') AS months, current_setting('xmloption') AS xml,
           current_setting('xmlbinary') AS base, '2026-01-01 00:00 EST'::timestamptz AS zone,
           ('2026-01-0' || id || ' 00:00 EST')::timestamptz AS read_zone
    FROM public.o
"""
PLAIN: LiteralString = "RESET ALL"
HOSTILE: LiteralString = """
    SET DateStyle = 'SQL, DMY'; SET IntervalStyle = 'sql_standard'; SET TimeZone = 'Europe/Moscow';
    SET array_nulls = off;
    SET quote_all_identifiers = on; SET default_text_search_config = 'pg_catalog.simple'; SET lc_monetary = 'POSIX';
    SET lc_numeric = 'POSIX'; SET lc_time = 'POSIX'; SET xmloption = 'document'; SET xmlbinary = 'hex';
    SET timezone_abbreviations = 'Australia'; SET extra_float_digits = -3; SET bytea_output = 'escape';
    SET transform_null_equals = on; SET gin_fuzzy_search_limit = 1; SET row_security = off; SET backslash_quote = 'off'
"""
OTHERS: dict[str, LiteralString] = {
    "German": "SET DateStyle = 'German'; SET IntervalStyle = 'postgres_verbose'; SET TimeZone = 'Europe/Moscow'",
    "Postgres, DMY": "SET DateStyle = 'Postgres, DMY'; SET IntervalStyle = 'iso_8601'; SET TimeZone = 'US/Eastern'",
    "ISO, DMY, arrays without NULL": "SET DateStyle = 'ISO, DMY'; SET array_nulls = off",
    "an English configuration": "SET DateStyle = 'ISO, MDY'; SET default_text_search_config = 'pg_catalog.english'",
}
# As the view pins them for everybody: what no session of a caller can have right for itself.
PINNED: LiteralString = "SET extra_float_digits = 1; SET bytea_output = 'hex'; SET row_security = on"


@pytest.fixture
async def superuser(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with database.connect() as connection:
        await connection.execute(TABLES)
        yield connection


async def shown(connection: AsyncConnection[Any], relation: LiteralString) -> list[Any]:
    """The rows of a relation, as this session, which sets nothing, writes each value."""
    return await rows(connection, sql.SQL("SELECT to_jsonb(v) FROM {} v ORDER BY v.id").format(sql.SQL(relation)))


async def register(session: AsyncConnection[Any], keys: LiteralString, zone: str) -> None:
    await session.execute(
        "SELECT listener.create_view('v', %s, key_columns => %s, timezone => %s)",
        (QUERY.replace("\\\\", "\\"), keys, zone),
    )


@pytest.mark.parametrize("keys", ["{id}", "{}"])
@pytest.mark.parametrize("settings", ["plain", "hostile", *OTHERS])
async def test_a_view_is_what_its_query_returned_where_it_was_registered(
    database: Database, superuser: AsyncConnection[Any], settings: str, keys: LiteralString
) -> None:
    own = {"plain": PLAIN, "hostile": HOSTILE, **OTHERS}[settings]
    async with database.connect("listener_migrator") as author, database.connect("listener_migrator") as hostile:
        await author.execute(own)
        await author.execute(PINNED)
        zone = await one(author, "SHOW TimeZone")
        await author.execute(sql.SQL("CREATE TABLE public.expected AS {}").format(sql.SQL(QUERY.replace("\\\\", "\\"))))
        await author.execute("GRANT SELECT ON public.expected TO PUBLIC")
        await register(author, keys, zone)
        expected = await shown(superuser, "public.expected")
        for caller in (superuser, author, hostile):
            if caller is hostile:
                await caller.execute(HOSTILE)
            await superuser.execute("DELETE FROM public.v")
            assert await rows(caller, "SELECT inserted, updated, deleted FROM listener.refresh('v', 't1'::text)") == [
                (4, 0, 0)
            ]
            assert await shown(superuser, "public.v") == expected
            assert await rows(caller, "SELECT inserted, updated, deleted FROM listener.refresh('v', 't1'::text)") == [
                (0, 0, 0)
            ]
            assert await rows(caller, "SELECT missing, extra, held FROM listener.compare('v', 't1'::text)") == [
                (0, 0, 4)
            ]
        # A value that is another one is seen, however the view's settings write it.
        await superuser.execute("UPDATE public.v SET range = tstzrange(lower(range) + '1 h', NULL) WHERE id = 3")
        assert await rows(hostile, "SELECT missing, extra, held FROM listener.compare('v', 't1'::text)") == [(1, 1, 4)]
        await superuser.execute("SELECT listener.refresh('v', 't1'::text)")
        assert await shown(superuser, "public.v") == expected


@pytest.mark.parametrize("where", ["session", "role", "database"])
async def test_no_setting_of_a_caller_reaches_a_result(
    database: Database, superuser: AsyncConnection[Any], where: str
) -> None:
    async with database.connect("listener_migrator") as author:
        await register(author, "{id}", "UTC")
        await author.execute("SELECT listener.refresh('v', 't1'::text)")
        before = await shown(superuser, "public.v")
    try:
        if where != "session":
            for setting in HOSTILE.split(";"):
                of = {"role": "ROLE listener_migrator IN DATABASE {}", "database": "DATABASE {}"}[where]
                await superuser.execute(
                    sql.SQL("ALTER " + of + setting.replace("\n", " ")).format(sql.Identifier(database.name))
                )
        async with database.connect("listener_migrator") as caller:
            if where == "session":
                await caller.execute(HOSTILE)
            assert await one(caller, "SHOW array_nulls") == "off"
            assert await rows(caller, "SELECT inserted, updated, deleted FROM listener.refresh('v', 't1'::text)") == [
                (0, 0, 0)
            ]
            await superuser.execute("DELETE FROM public.v")
            await caller.execute("SELECT listener.refresh('v', 't1'::text)")
            assert await one(caller, "SHOW DateStyle") == "SQL, DMY", "the caller's are its own again"
            assert await one(caller, "SHOW timezone_abbreviations") == "Australia"
    finally:
        await superuser.execute(
            sql.SQL("ALTER ROLE listener_migrator IN DATABASE {} RESET ALL").format(sql.Identifier(database.name))
        )
    async with database.connect() as plain:
        await plain.execute("RESET ALL")
        await plain.execute("SET DateStyle = 'ISO, MDY'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres'")
        await plain.execute(
            "SET bytea_output = 'hex'; SET extra_float_digits = 1; SET row_security = on; SET array_nulls = on"
        )
        assert await shown(plain, "public.v") == before


async def test_a_literal_is_read_in_the_views_time_zone_also_where_it_is_made_again(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    query = "SELECT tenant_id, id, '01/03/2026 00:00'::timestamptz AS since FROM public.o WHERE at >= '2026-03-01'"
    async with database.connect("listener_migrator") as author:
        await author.execute("SET TimeZone = 'America/New_York'; SET DateStyle = 'ISO, DMY'")
        await author.execute("SELECT listener.create_view('v', %s, '{id}', timezone => 'Europe/Vienna')", (query,))
        await author.execute("SELECT listener.refresh('v', 't1'::text)")
    found: LiteralString = "SELECT id, since AT TIME ZONE 'UTC' = '2026-02-28 23:00' FROM public.v ORDER BY 1"
    # 23:30 in London on 28 February is March in Vienna.
    assert await rows(superuser, found) == [(1, True), (2, True)]
    await superuser.execute("DROP VIEW listener.definition_1 CASCADE")
    async with database.connect("listener_service") as service:
        await service.execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'SQL, MDY'")
        await service.execute("SELECT * FROM listener.changed_definitions()")
        await superuser.execute("DELETE FROM public.v")
        await service.execute("SELECT listener.refresh('v', 't1'::text)")
    assert await rows(superuser, found) == [(1, True), (2, True)]
    async with database.connect("listener_migrator") as author:
        assert await one(author, "SELECT listener.same_query('v', %s)", query)
        name = await one(author, "SELECT listener.begin_alter('v', max_age => '1 hour')")
        await author.execute("SELECT listener.expand(%s)", (name,))
        await author.execute("SELECT listener.refresh(%s, 't1'::text)", (name,))
        assert (
            await one(author, "SELECT settings ->> 'DateStyle' FROM listener.managed_view WHERE name = %s", name)
            == "ISO, DMY"
        )
        await author.execute("SELECT listener.drain()")
        await author.execute("SELECT listener.finish_alter('v')")
    assert await rows(superuser, found) == [(1, True), (2, True)]


async def test_a_fragment_of_xml_is_kept_where_the_session_reads_documents(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    query = "SELECT tenant_id, id, xmlforest(raw, words) AS x, ARRAY[xmlforest(raw, words)] AS xs FROM public.o"
    try:
        await superuser.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server was built without libxml")
    async with database.connect("listener_migrator") as author:
        await author.execute("SET xmloption = 'document'")
        await author.execute("SELECT listener.create_view('v', %s, '{id}')", (query,))
        for written in (4, 0):
            assert await one(author, "SELECT inserted FROM listener.refresh('v', 't1'::text)") == written
        assert await one(superuser, "SELECT x::text FROM public.v WHERE id = 2") == "<raw>05/06/07</raw>"


async def test_a_backslash_that_a_session_reads_otherwise_is_refused(
    database: Database, superuser: AsyncConnection[Any]
) -> None:
    async with database.connect("listener_migrator") as author:
        await author.execute("SET standard_conforming_strings = off; SET escape_string_warning = off")
        with pytest.raises(psycopg.Error, match="backslash") as refused:
            await author.execute(
                "SELECT listener.create_view('v', E'SELECT tenant_id, ''a\\\\tb'' AS t FROM public.o')"
            )
        assert refused.value.sqlstate == "LSN03"
        assert refused.value.diag.message_hint == "SET standard_conforming_strings = on."
        await author.execute("SELECT listener.create_view('v', 'SELECT tenant_id, id FROM public.o')")
        assert await one(author, "SHOW standard_conforming_strings") == "off"
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 1
