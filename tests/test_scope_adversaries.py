"""Queries that only look tenant-local are never proven, and each of them is known to read other tenants' rows."""

# ruff: noqa: E501 - the queries are a line each

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from adversaries import LOOKUP, QUERIES, SCHEMA, TABLES, TENANTS, filling
from conftest import Database
from shop import one, rows

pytestmark = pytest.mark.anyio
FILLINGS = 12


@pytest.fixture
async def odd(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """The superuser, where the tables are."""
    async with database.connect() as superuser:
        await superuser.execute(SCHEMA.encode())
        await superuser.execute(LOOKUP)
        yield superuser


async def scope(superuser: AsyncConnection[Any], query: str, tenant_type: str) -> list[Any]:
    """What tenant_scope says of each source, asked by the migrating role."""
    await superuser.execute("SET ROLE listener_owner; SET search_path = odd")
    await superuser.execute("DROP VIEW IF EXISTS odd.asked")
    await superuser.execute(f"CREATE VIEW odd.asked WITH (security_invoker) AS {query}".encode())
    await superuser.execute("GRANT SELECT ON odd.asked TO listener_service; RESET search_path")
    found = await rows(
        superuser, "SELECT proven, advice FROM listener.tenant_scope('odd.asked', 'tenant_id', %s)", tenant_type
    )
    await superuser.execute("RESET ROLE")
    assert all(advice for proven, advice in found if not proven), "what is not proven says what fixes it"
    return found


async def proven(superuser: AsyncConnection[Any], query: str, tenant_type: str = "text") -> bool:
    """Whether the query is taken as one whose tenants do not depend on each other."""
    return all(row[0] for row in await scope(superuser, query, tenant_type))


async def depends_on_others(
    superuser: AsyncConnection[Any], query: str, tenant_type: str, chance: random.Random
) -> bool:
    """Whether some tenant's rows are others once capture would find no row of another tenant in the sources."""
    asked = sql.SQL("SELECT a::text FROM ({}) a WHERE tenant_id::text = %s").format(sql.SQL(query.replace("%", "%%")))
    async with superuser.transaction(force_rollback=True):
        await superuser.execute("SET LOCAL search_path = odd")
        for statement in filling(query, chance):
            await superuser.execute(statement.encode())
        for tenant in TENANTS[tenant_type]:
            among_all = Counter(await rows(superuser, asked, tenant))
            async with superuser.transaction(force_rollback=True):
                for table in TABLES:
                    await superuser.execute(
                        sql.SQL(
                            "DELETE FROM {} WHERE listener.canonical_or_null(tenant_id::text, %s)"
                            ' IS DISTINCT FROM %s::text COLLATE "C"'
                        ).format(sql.Identifier(table)),
                        (tenant_type, tenant),
                    )
                await superuser.execute("DELETE FROM items WHERE code NOT IN (SELECT code FROM boxes)")
                if among_all != Counter(await rows(superuser, asked, tenant)):
                    return True
    return False


async def test_no_adversary_is_proven(odd: AsyncConnection[Any]) -> None:
    assert len(QUERIES) >= 60
    assert [name for name, (tenant_type, query) in QUERIES.items() if await proven(odd, query, tenant_type)] == []


async def test_every_adversary_reads_other_tenants_rows(odd: AsyncConnection[Any]) -> None:
    honest: set[str] = set()
    for seed in range(FILLINGS):
        for name in QUERIES.keys() - honest:
            tenant_type, query = QUERIES[name]
            if await depends_on_others(odd, query, tenant_type, random.Random(f"{seed} {name}")):
                honest.add(name)
    assert QUERIES.keys() - honest == set()


LOCAL: dict[str, tuple[str, str]] = {
    "texts": ("text", "SELECT w.tenant_id, m.n FROM words w JOIN notes m ON m.tenant_id = w.tenant_id"),
    "a varchar and a text": ("text", "SELECT w.tenant_id, m.n FROM words w JOIN short m ON m.tenant_id = w.tenant_id"),
    "texts of uuids, as uuids": (
        "uuid",
        "SELECT i.tenant_id, m.n FROM ids i JOIN notes m ON m.tenant_id::uuid = i.tenant_id",
    ),
    "texts of numbers, as numbers": (
        "integer",
        "SELECT a.tenant_id, m.n FROM numbers a JOIN notes m ON m.tenant_id::int = a.tenant_id",
    ),
    "numbers as texts": (
        "text",
        "SELECT a.tenant_id::text AS tenant_id, m.n FROM numbers a JOIN notes m ON m.tenant_id = a.tenant_id::text",
    ),
    "a look-up": ("text", "SELECT b.tenant_id, i.n FROM boxes b JOIN items i ON i.code = b.code"),
    "a word of one's own, aside": (
        "text",
        "SELECT w.tenant_id, m.n FROM words w JOIN notes m ON m.tenant_id = w.tenant_id AND lower(m.code) = lower(w.code)",
    ),
}


async def test_what_compares_tenants_by_their_text_is_still_proven(odd: AsyncConnection[Any]) -> None:
    assert [name for name, (tenant_type, query) in LOCAL.items() if not await proven(odd, query, tenant_type)] == []


async def test_the_advice_names_the_cast_or_the_operator(odd: AsyncConnection[Any]) -> None:
    by_cast = await scope(odd, *reversed(QUERIES["as numbers"]))
    assert any("is compared by a cast" in advice for _, advice in by_cast)
    by_operator = await scope(odd, *reversed(QUERIES["an operator of one's own"]))
    assert "operator odd.=(text,text)" in by_operator[0][1]


async def make_loose(superuser: AsyncConnection[Any]) -> None:
    """A collation that takes different texts for equal; not every server is built with ICU, which such collations come from."""
    await superuser.execute(
        """CREATE COLLATION odd.loose (locale = 'C');
           UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'loose';
           CREATE TABLE odd.loosely (id int PRIMARY KEY, tenant_id text COLLATE odd.loose, word text COLLATE odd.loose, n int);
           CREATE FUNCTION odd.alike(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE
               AS 'SELECT $1 = $2 COLLATE odd.loose';
           GRANT SELECT ON odd.loosely TO listener_service; ALTER TABLE odd.loosely OWNER TO listener_owner"""
    )


COLLATED = {
    "in the join": "SELECT w.tenant_id, m.n FROM words w JOIN notes m ON m.tenant_id = w.tenant_id COLLATE loose",
    "of a column between": """SELECT w.tenant_id, m.n FROM words w JOIN loosely l ON l.word = w.tenant_id
                              JOIN notes m ON m.tenant_id = l.word""",
    "in a subquery": """SELECT tenant_id, (SELECT sum(n) FROM notes m WHERE m.tenant_id = w.tenant_id COLLATE loose)
                        FROM words w""",
    "in a function": "SELECT w.tenant_id, m.n FROM words w JOIN notes m ON alike(m.tenant_id, w.tenant_id)",
    "of the tenant column": "SELECT tenant_id, n FROM loosely",
    "of the tenant column, shown under another": 'SELECT tenant_id COLLATE "C" AS tenant_id, n FROM loosely',
    "of the shown column": "SELECT tenant_id COLLATE loose AS tenant_id, n FROM words",
    "of the groups": "SELECT min(tenant_id) AS tenant_id, sum(n) FROM words GROUP BY tenant_id COLLATE loose",
}


@pytest.mark.parametrize("case", COLLATED)
async def test_a_collation_that_takes_two_tenants_for_one_proves_nothing(odd: AsyncConnection[Any], case: str) -> None:
    await make_loose(odd)
    assert not await proven(odd, COLLATED[case])


async def test_a_tenant_column_with_such_a_collation_is_refused(odd: AsyncConnection[Any], database: Database) -> None:
    await make_loose(odd)
    await odd.execute("GRANT USAGE, CREATE ON SCHEMA odd TO listener_owner")
    shown = "SELECT listener.create_view('odd.v', 'SELECT tenant_id COLLATE odd.loose AS tenant_id, n FROM odd.words')"
    for statement in (
        "SELECT listener.create_view('odd.v', 'SELECT tenant_id COLLATE \"C\" AS tenant_id, n FROM odd.loosely')",
        shown,
        "SELECT listener.add_source('odd.loosely', 'tenant_id')",
    ):
        async with database.connect("listener_migrator") as migrator:
            with pytest.raises(psycopg.Error, match=r"odd\.loose, which takes different texts for equal") as raised:
                await migrator.execute(statement.encode())
        assert raised.value.sqlstate == "LSN03"
        assert raised.value.diag.message_hint
    assert await one(odd, "SELECT count(*) FROM listener.managed_view") == 0
    # As the hint says: a change to it refreshes every tenant then.
    async with database.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.add_source('odd.loosely')")
        await migrator.execute(
            "SELECT listener.create_view('odd.v', 'SELECT tenant_id COLLATE \"C\" AS tenant_id, n FROM odd.loosely')"
        )


async def test_texts_that_a_type_takes_for_equal_prove_nothing(odd: AsyncConnection[Any]) -> None:
    if not await one(odd, "SELECT count(*) FROM pg_available_extensions WHERE name = 'citext'"):
        pytest.fail("the server has no citext: install PostgreSQL's contrib")
    await odd.execute(
        """CREATE EXTENSION citext SCHEMA odd;
           CREATE TABLE odd.mails (id int PRIMARY KEY, tenant_id text, mail odd.citext, other odd.citext);
           GRANT SELECT ON odd.mails TO listener_service; ALTER TABLE odd.mails OWNER TO listener_owner"""
    )
    assert not await proven(
        odd, "SELECT w.tenant_id FROM words w JOIN notes m ON w.tenant_id::citext = m.tenant_id::citext"
    )
    assert not await proven(
        odd,
        "SELECT a.mail::text AS tenant_id, w.n FROM mails a JOIN mails b ON b.mail = a.mail JOIN words w ON w.tenant_id = b.mail::text",
    )
    assert not await proven(
        odd, "SELECT tenant_id::citext::text AS tenant_id, sum(n) FROM words GROUP BY tenant_id::citext"
    )
    # It is no tenant that is compared.
    assert await proven(
        odd, "SELECT a.tenant_id FROM mails a JOIN mails b ON b.tenant_id = a.tenant_id AND b.mail = a.other"
    )
