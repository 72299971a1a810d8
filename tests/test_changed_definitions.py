"""What changes a result although no row is written: the next sweep refreshes every tenant, and no drift is reported."""

# ruff: noqa: S608, E501 - the statements are made of the text below, and some are a line each

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from conftest import Database
from ledgers import arranged, managed, open_ledgers, shown, swept
from shop import one, rows

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_ledgers(database)
    return database


TENANTS = "SELECT * FROM unnest('{t1,t2}'::text[])"
FEE: LiteralString = "CREATE FUNCTION shop.fee(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';"
TRIPLE: LiteralString = "CREATE OR REPLACE FUNCTION shop.fee(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 3'"
RLS: LiteralString = """
ALTER TABLE shop.o ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON shop.o USING (tenant_id = current_setting('app.current_tenant_id', true));
"""
ALL = [("t1", 10), ("t2", 20)]
V = "SELECT tenant_id, v FROM shop.o"

# What is arranged, the query, what changes, the rows before and after.
CHANGES: dict[str, tuple[LiteralString, str, LiteralString, list[Any], list[Any]]] = {
    "an immutable function": (
        FEE, "SELECT tenant_id, sum(shop.fee(v)) AS t FROM shop.o GROUP BY 1", TRIPLE,
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a parsed function": (
        "CREATE FUNCTION shop.fee(int) RETURNS int LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT $1 * 2; END",
        "SELECT tenant_id, shop.fee(v) AS t FROM shop.o",
        "CREATE OR REPLACE FUNCTION shop.fee(int) RETURNS int LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT $1 * 3; END",
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a setting of a function": (
        "CREATE FUNCTION shop.day(text) RETURNS text LANGUAGE sql IMMUTABLE SET datestyle = 'ISO, MDY' AS 'SELECT $1::date::text'",
        "SELECT tenant_id, shop.day('01/02/03') AS t FROM shop.o",
        "ALTER FUNCTION shop.day(text) SET datestyle = 'ISO, DMY'",
        [("t1", "2003-01-02"), ("t2", "2003-01-02")], [("t1", "2003-02-01"), ("t2", "2003-02-01")],
    ),
    "the function of an operator": (
        FEE
        + """CREATE FUNCTION shop.op(int, int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT shop.fee($1) + $2';
             CREATE OPERATOR shop.@@@ (leftarg = int, rightarg = int, function = shop.op)""",
        "SELECT tenant_id, v OPERATOR(shop.@@@) 1 AS t FROM shop.o", TRIPLE,
        [("t1", 21), ("t2", 41)], [("t1", 31), ("t2", 61)],
    ),
    "the final function of an aggregate": (
        FEE + "CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0', finalfunc = shop.fee)",
        "SELECT tenant_id, shop.total(v) AS t FROM shop.o GROUP BY 1", TRIPLE,
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "an aggregate": (
        "CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0')",
        "SELECT tenant_id, shop.total(v) AS t FROM shop.o GROUP BY 1",
        "CREATE OR REPLACE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '100')",
        ALL, [("t1", 110), ("t2", 120)],
    ),
    "an aggregate in the text of a function, dropped and made again": (
        """CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0');
           CREATE FUNCTION shop.outer(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT shop.total(x) FROM unnest(ARRAY[$1]) x'""",
        "SELECT tenant_id, shop.outer(v) AS t FROM shop.o",
        """DROP AGGREGATE shop.total(int);
           CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '100')""",
        ALL, [("t1", 110), ("t2", 120)],
    ),
    "a function of a function of text": (
        FEE
        + """CREATE FUNCTION shop.middle(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN shop.fee($1); END';
             CREATE FUNCTION shop.outer(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT shop.middle($1)'""",
        "SELECT tenant_id, shop.outer(v) AS t FROM shop.o", TRIPLE,
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a function of a parsed function": (
        FEE + "CREATE FUNCTION shop.outer(int) RETURNS int LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT shop.fee($1); END",
        "SELECT tenant_id, shop.outer(v) AS t FROM shop.o", TRIPLE,
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a cast in the text of a function": (
        """CREATE TYPE shop.pair AS (a int, b int);
           CREATE FUNCTION shop.paired(int) RETURNS shop.pair LANGUAGE sql IMMUTABLE AS 'SELECT $1, $1 * 2';
           CREATE CAST (int AS shop.pair) WITH FUNCTION shop.paired(int);
           CREATE FUNCTION shop.outer(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT ($1::shop.pair).b'""",
        "SELECT tenant_id, shop.outer(v) AS t FROM shop.o",
        "CREATE OR REPLACE FUNCTION shop.paired(int) RETURNS shop.pair LANGUAGE sql IMMUTABLE AS 'SELECT $1, $1 * 3'",
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a function in a nested view": (
        FEE + "CREATE VIEW shop.nested AS SELECT tenant_id, shop.fee(v) AS t FROM shop.o",
        "SELECT tenant_id, t FROM shop.nested", TRIPLE,
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a nested view in a nested view": (
        """CREATE VIEW shop.inner AS SELECT tenant_id, v * 2 AS t FROM shop.o;
           CREATE VIEW shop.nested AS SELECT tenant_id, t FROM shop.inner""",
        "SELECT tenant_id, t FROM shop.nested",
        "CREATE OR REPLACE VIEW shop.inner AS SELECT tenant_id, v * 3 AS t FROM shop.o",
        [("t1", 20), ("t2", 40)], [("t1", 30), ("t2", 60)],
    ),
    "a label of an enum": (
        "CREATE TYPE shop.st AS ENUM ('open', 'paid'); ALTER TABLE shop.o ADD COLUMN state shop.st DEFAULT 'open'",
        "SELECT tenant_id, state::text AS state, count(*) AS n FROM shop.o GROUP BY 1, 2",
        "ALTER TYPE shop.st RENAME VALUE 'open' TO 'pending'",
        [("t1", "open", 1), ("t2", "open", 1)], [("t1", "pending", 1), ("t2", "pending", 1)],
    ),
    "a label of an enum in an array": (
        "CREATE TYPE shop.st AS ENUM ('open', 'paid'); ALTER TABLE shop.o ADD COLUMN state shop.st[] DEFAULT '{open}'",
        "SELECT tenant_id, state::text AS state FROM shop.o",
        "ALTER TYPE shop.st RENAME VALUE 'open' TO 'pending'",
        [("t1", "{open}"), ("t2", "{open}")], [("t1", "{pending}"), ("t2", "{pending}")],
    ),
    "a label of an enum in a composite of a domain": (
        """CREATE TYPE shop.st AS ENUM ('open', 'paid'); CREATE DOMAIN shop.dst AS shop.st; CREATE TYPE shop.box AS (d shop.dst);
           ALTER TABLE shop.o ADD COLUMN state shop.box DEFAULT '(open)'""",
        "SELECT tenant_id, state::text AS state FROM shop.o",
        "ALTER TYPE shop.st RENAME VALUE 'open' TO 'pending'",
        [("t1", "(open)"), ("t2", "(open)")], [("t1", "(pending)"), ("t2", "(pending)")],
    ),
    "an attribute's name": (
        "CREATE TYPE shop.pair AS (a int, b int); ALTER TABLE shop.o ADD COLUMN p shop.pair DEFAULT '(1,2)'",
        "SELECT tenant_id, to_json(p)::text AS p FROM shop.o",
        "ALTER TYPE shop.pair RENAME ATTRIBUTE a TO c",
        [("t1", '{"a":1,"b":2}'), ("t2", '{"a":1,"b":2}')], [("t1", '{"c":1,"b":2}'), ("t2", '{"c":1,"b":2}')],
    ),
    "one more attribute": (
        "CREATE TYPE shop.pair AS (a int, b int); ALTER TABLE shop.o ADD COLUMN p shop.pair DEFAULT '(1,2)'",
        "SELECT tenant_id, p::text AS p FROM shop.o",
        "ALTER TYPE shop.pair ADD ATTRIBUTE c int",
        [("t1", "(1,2)"), ("t2", "(1,2)")], [("t1", "(1,2,)"), ("t2", "(1,2,)")],
    ),
    "a row as a whole, one more column": (
        "", "SELECT tenant_id, to_jsonb(o)::text AS t FROM shop.o",
        "ALTER TABLE shop.o ADD COLUMN x int DEFAULT 7",
        [("t1", '{"v": 10, "id": 1, "tenant_id": "t1"}'), ("t2", '{"v": 20, "id": 2, "tenant_id": "t2"}')],
        [("t1", '{"v": 10, "x": 7, "id": 1, "tenant_id": "t1"}'), ("t2", '{"v": 20, "x": 7, "id": 2, "tenant_id": "t2"}')],
    ),
    "a row as a whole, a column's name": (
        "", "SELECT tenant_id, to_jsonb(o)::text AS t FROM shop.o",
        "ALTER TABLE shop.o RENAME COLUMN v TO w",
        [("t1", '{"v": 10, "id": 1, "tenant_id": "t1"}'), ("t2", '{"v": 20, "id": 2, "tenant_id": "t2"}')],
        [("t1", '{"w": 10, "id": 1, "tenant_id": "t1"}'), ("t2", '{"w": 20, "id": 2, "tenant_id": "t2"}')],
    ),
    "a row as a whole, one column less": (
        "", "SELECT tenant_id, to_jsonb(o)::text AS t FROM shop.o",
        "ALTER TABLE shop.o DROP COLUMN id",
        [("t1", '{"v": 10, "id": 1, "tenant_id": "t1"}'), ("t2", '{"v": 20, "id": 2, "tenant_id": "t2"}')],
        [("t1", '{"v": 10, "tenant_id": "t1"}'), ("t2", '{"v": 20, "tenant_id": "t2"}')],
    ),
    "a dictionary of text search": (
        """CREATE TEXT SEARCH DICTIONARY shop.plain (template = pg_catalog.simple);
           CREATE TEXT SEARCH CONFIGURATION shop.words (parser = pg_catalog.default);
           ALTER TEXT SEARCH CONFIGURATION shop.words ADD MAPPING FOR asciiword WITH shop.plain""",
        "SELECT tenant_id, to_tsvector('shop.words', 'dogs')::text AS t FROM shop.o",
        "ALTER TEXT SEARCH CONFIGURATION shop.words ALTER MAPPING FOR asciiword WITH english_stem",
        [("t1", "'dogs':1"), ("t2", "'dogs':1")], [("t1", "'dog':1"), ("t2", "'dog':1")],
    ),
    "the domain of a cast": (
        "CREATE DOMAIN shop.positive AS int",
        "SELECT tenant_id, 5::shop.positive + v AS t FROM shop.o",
        "ALTER DOMAIN shop.positive ADD CHECK (VALUE > 1)",
        [("t1", 15), ("t2", 25)], [("t1", 15), ("t2", 25)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
async def test_what_a_result_depends_on_is_noticed_by_the_next_sweep(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], change: str
) -> None:
    arrangement, query, statement, before, after = CHANGES[change]
    await arranged(superuser, arrangement)
    await managed(shop, query, tenants_query=TENANTS)
    assert await swept(service) == []
    assert await shown(superuser) == before
    await arranged(superuser, statement)
    for tenant in ("t1", "t2"):
        assert await one(service, "SELECT outcome FROM listener.check_drift('shown', %s)", tenant) != "drift"
    assert ("shown", None) in await swept(service)
    assert await shown(superuser) == after
    assert await swept(service) == []


async def test_another_expression_of_a_generated_column_is_noticed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(superuser, FEE + "ALTER TABLE shop.o ADD COLUMN g int GENERATED ALWAYS AS (shop.fee(v)) STORED")
    await managed(shop, "SELECT tenant_id, g FROM shop.o")
    assert await swept(service) == []
    if superuser.info.server_version >= 170000:
        await arranged(superuser, "ALTER TABLE shop.o ALTER COLUMN g SET EXPRESSION AS (shop.fee(v) + 1)")
        assert await swept(service) == [("shown", None)]
        assert await shown(superuser) == [("t1", 21), ("t2", 41)]
    await arranged(superuser, TRIPLE)
    assert await swept(service) == [("shown", None)]


async def test_a_table_of_depends_on_that_is_rewritten_is_noticed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(
        superuser, "CREATE FUNCTION shop.w() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT sum(w) FROM shop.s'"
    )
    await managed(shop, "SELECT tenant_id, shop.w() AS t FROM shop.o", depends_on="{shop.s}")
    assert await swept(service) == []
    await arranged(superuser, "ALTER TABLE shop.s ALTER COLUMN w TYPE int USING w * 100")
    assert await swept(service) == [("shown", None)]
    assert await shown(superuser) == [("t1", 300), ("t2", 300)]


async def test_what_changes_no_result_refreshes_nobody(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(superuser, RLS + FEE)
    await managed(shop, "SELECT tenant_id, shop.fee(v) AS t FROM shop.o", tenants_query=TENANTS)
    assert await swept(service) == []
    await arranged(
        superuser,
        """ALTER TABLE shop.o ADD COLUMN note text; ALTER TABLE shop.o RENAME COLUMN id TO number;
           GRANT SELECT ON shop.o TO listener_reader; GRANT EXECUTE ON FUNCTION shop.fee TO listener_reader;
           CREATE FUNCTION shop.other() RETURNS int LANGUAGE sql AS 'SELECT 1';
           CREATE POLICY w ON shop.o FOR INSERT WITH CHECK (true)""",
    )
    await superuser.execute("ANALYZE shop.o")
    await superuser.execute("VACUUM FULL pg_proc")
    assert await swept(service) == []


async def test_a_fingerprint_of_the_release_before_is_replaced_unless_something_changed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await arranged(superuser, "CREATE VIEW shop.nested AS SELECT tenant_id, v FROM shop.o")
    await managed(shop, V)
    await managed(shop, "SELECT tenant_id, v FROM shop.nested", name="other")
    assert await swept(service) == []
    await superuser.execute("UPDATE listener.managed_view v SET fingerprint = listener.first_fingerprint(v)")
    await arranged(superuser, "CREATE OR REPLACE VIEW shop.nested AS SELECT tenant_id, v + 1 AS v FROM shop.o")
    await superuser.execute("SET ROLE listener_owner; SELECT listener.regenerate(); RESET ROLE")
    assert await swept(service) == [("other", None)]
    assert await rows(superuser, "SELECT v FROM public.other ORDER BY 1") == [(11,), (21,)]
    assert await swept(service) == []
