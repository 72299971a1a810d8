"""What a definition may read although it does not name it: refused by name, or harmless."""

# ruff: noqa: S608, E501 - the statements are made of the text below, and some are a line each

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from ledgers import arranged, managed, open_ledgers, shown
from shop import TRACES, rows, settle

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_ledgers(database)
    return database


READER: LiteralString = """
CREATE FUNCTION shop.reader(int, int) RETURNS bigint LANGUAGE plpgsql STABLE AS 'BEGIN RETURN (SELECT sum(w) FROM shop.s); END';
CREATE FUNCTION shop.liar(int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT sum(w) + $1 FROM shop.s';
"""
ROWS = "SELECT tenant_id, id, {} AS t FROM shop.o"

# What is arranged, the query, and what the refusal names.
HIDING: dict[str, tuple[LiteralString, str, str]] = {
    "an operator": (
        READER + "CREATE OPERATOR shop.@@@ (leftarg = int, rightarg = int, function = shop.reader)",
        ROWS.format("v OPERATOR(shop.@@@) 1"),
        r"shop\.reader",
    ),
    "an aggregate": (
        READER
        + """CREATE FUNCTION shop.step(bigint, int) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT $1 + $2 + shop.liar(0)';
             CREATE AGGREGATE shop.total(int) (sfunc = shop.step, stype = bigint, initcond = '0')""",
        "SELECT tenant_id, shop.total(v) AS t FROM shop.o GROUP BY 1",
        r"shop\.step",
    ),
    "the final function of an aggregate": (
        READER
        + """CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0', finalfunc = shop.liar)""",
        "SELECT tenant_id, shop.total(v) AS t FROM shop.o GROUP BY 1",
        r"shop\.liar",
    ),
    "a window function": (
        READER
        + """CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0', finalfunc = shop.liar)""",
        ROWS.format("shop.total(v) OVER (PARTITION BY tenant_id)"),
        r"shop\.liar",
    ),
    "a cast": (
        """CREATE TYPE shop.pair AS (a int, b bigint);
           CREATE FUNCTION shop.paired(int) RETURNS shop.pair LANGUAGE sql STABLE AS 'SELECT $1, sum(w) FROM shop.s';
           CREATE CAST (int AS shop.pair) WITH FUNCTION shop.paired(int)""",
        ROWS.format("(v::shop.pair).b"),
        r"shop\.paired",
    ),
    "a function that calls itself immutable": (READER, ROWS.format("shop.liar(v)"), r"shop\.liar"),
    "an immutable function with a parsed body": (
        "CREATE FUNCTION shop.parsed() RETURNS bigint LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT sum(w) FROM shop.s; END",
        ROWS.format("shop.parsed()"),
        r"shop\.parsed",
    ),
    "a function of a function": (
        READER
        + """CREATE FUNCTION shop.middle(int) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN shop.reader($1, 1); END';
             CREATE FUNCTION shop.outer(int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT shop.middle($1)'""",
        ROWS.format("shop.outer(v)"),
        r"shop\.reader",
    ),
    "an operator in the text of a function": (
        READER
        + """CREATE OPERATOR shop.@@@ (leftarg = int, rightarg = int, function = shop.reader);
             CREATE FUNCTION shop.outer(int) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT $1 OPERATOR(shop.@@@) 1'""",
        ROWS.format("shop.outer(v)"),
        r"shop\.reader",
    ),
    "a function of parsed functions": (
        READER
        + """CREATE FUNCTION shop.outer(int) RETURNS bigint LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT shop.liar($1); END""",
        ROWS.format("shop.outer(v)"),
        r"shop\.liar",
    ),
    "a statement that a function puts together": (
        """CREATE FUNCTION shop.made(t text) RETURNS bigint LANGUAGE plpgsql IMMUTABLE
           AS 'DECLARE n bigint; BEGIN EXECUTE ''SELECT count(*) '' || ''FR'' || ''OM shop.s'' INTO n; RETURN n; END'""",
        ROWS.format("shop.made('s')"),
        r"shop\.made",
    ),
    "the check of a domain": (
        READER + "CREATE DOMAIN shop.checked AS int CHECK (shop.liar(VALUE) > 0)",
        ROWS.format("v::shop.checked"),
        r"shop\.liar",
    ),
    "a generated column": (
        READER + "ALTER TABLE shop.o ADD COLUMN g bigint GENERATED ALWAYS AS (shop.liar(v)) STORED",
        ROWS.format("g"),
        r"shop\.liar",
    ),
    "an ordering of the user's own": (
        READER
        + """CREATE FUNCTION shop.less(int, int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 < $2 + shop.liar(0)';
             CREATE OPERATOR shop.<<< (leftarg = int, rightarg = int, function = shop.less)""",
        "SELECT tenant_id, count(*) FILTER (WHERE v OPERATOR(shop.<<<) 3) AS t FROM shop.o GROUP BY 1",
        r"shop\.(less|liar)",
    ),
    "a nested view": (
        READER + "CREATE VIEW shop.nested AS SELECT tenant_id, id, shop.liar(v) AS t FROM shop.o",
        "SELECT tenant_id, id, t FROM shop.nested",
        r"shop\.liar",
    ),
    "query_to_xml": ("", ROWS.format("query_to_xml('TABLE shop.s', true, true, '')::text"), "query_to_xml"),
    "table_to_xml in a function": (
        """CREATE FUNCTION shop.outer() RETURNS text LANGUAGE sql IMMUTABLE
           AS $$ SELECT table_to_xml('shop.s', true, true, '')::text $$""",
        ROWS.format("shop.outer()"),
        "table_to_xml",
    ),
    "ts_stat": ("", ROWS.format("(SELECT count(*) FROM ts_stat('SELECT to_tsvector(''a'')'))"), "ts_stat"),
    "nextval": ("CREATE SEQUENCE shop.seq", ROWS.format("nextval('shop.' || 'seq')"), "nextval"),
    "a size": ("", ROWS.format("pg_total_relation_size(16384)"), "pg_total_relation_size"),
    "a comment": ("", ROWS.format("obj_description(16384, 'pg_class')"), "obj_description"),
}


@pytest.mark.parametrize("case", HIDING)
async def test_what_may_read_a_table_unseen_is_refused_by_name_and_leaves_nothing(
    shop: Database, superuser: AsyncConnection[Any], case: str
) -> None:
    arrangement, query, named = HIDING[case]
    await arranged(superuser, arrangement)
    before = await rows(superuser, TRACES)
    with pytest.raises(psycopg.Error, match=f"the query calls .*{named}") as raised:
        await managed(shop, query)
    assert raised.value.sqlstate == "LSN03"
    assert "depends_on" in str(raised.value.diag.message_hint)
    assert await rows(superuser, TRACES) == before


@pytest.mark.parametrize(("extension", "call"), [("tablefunc", "crosstab('SELECT 1, 2, 3') AS x(a int, b int)")])
async def test_a_function_of_an_extension_that_runs_a_text_is_refused(
    shop: Database, superuser: AsyncConnection[Any], extension: LiteralString, call: str
) -> None:
    await superuser.execute("CREATE EXTENSION " + extension + " SCHEMA public")
    with pytest.raises(psycopg.Error, match=r"the query calls public\.crosstab") as raised:
        await managed(shop, ROWS.format(f"(SELECT max(b) FROM public.{call})"))
    assert raised.value.sqlstate == "LSN03"


async def test_a_comparison_of_an_operator_family_that_reads_a_table_is_refused(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await arranged(superuser, READER)
    await superuser.execute(
        """CREATE FUNCTION shop.less(int, int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 < $2';
           CREATE FUNCTION shop.compared(int, int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT ($1 - $2 + shop.liar(0))::int';
           CREATE OPERATOR shop.<<< (leftarg = int, rightarg = int, function = shop.less);
           CREATE OPERATOR CLASS shop.odd FOR TYPE int USING btree AS OPERATOR 1 shop.<<<,
               OPERATOR 3 =, FUNCTION 1 shop.compared(int, int)"""
    )
    with pytest.raises(psycopg.Error, match=r"the query calls .*shop\.liar"):
        await managed(
            shop, "SELECT tenant_id, array_agg(v ORDER BY v USING OPERATOR(shop.<<<)) AS t FROM shop.o GROUP BY 1"
        )


HARMLESS: dict[str, tuple[LiteralString, str]] = {
    "an immutable function": (
        "CREATE FUNCTION shop.fee(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2'",
        ROWS.format("shop.fee(v)"),
    ),
    "FROM in an expression": (
        """CREATE FUNCTION shop.s_of(s date) RETURNS int LANGUAGE plpgsql IMMUTABLE
           AS 'BEGIN RETURN extract(year FROM $1)::int + length(trim(both '' '' from ''x'')); END'""",
        ROWS.format("shop.s_of('2026-01-01')"),
    ),
    "an aggregate of immutable functions": (
        "CREATE AGGREGATE shop.total(int) (sfunc = int4pl, stype = int, initcond = '0')",
        "SELECT tenant_id, shop.total(v) AS t FROM shop.o GROUP BY 1",
    ),
    "what no table is behind": ("", ROWS.format("pg_typeof(v)::text || pg_column_size(v)")),
}


@pytest.mark.parametrize("case", HARMLESS)
async def test_what_reads_no_table_is_not_refused(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], case: str
) -> None:
    arrangement, query = HARMLESS[case]
    await arranged(superuser, arrangement)
    await managed(shop, query)
    await settle(service)
    assert len(await shown(superuser)) == 2


FOREIGN: LiteralString = """
CREATE FOREIGN DATA WRAPPER nobody; CREATE SERVER nowhere FOREIGN DATA WRAPPER nobody;
CREATE TABLE shop.part (tenant_id text, id int) PARTITION BY RANGE (id);
ALTER TABLE shop.part OWNER TO shop_owner;
CREATE FOREIGN TABLE shop.part_1 PARTITION OF shop.part FOR VALUES FROM (0) TO (9) SERVER nowhere;
"""
REFUSED: dict[str, tuple[LiteralString, str, str]] = {
    "a system catalog": ("", "SELECT relname::text AS tenant_id FROM pg_class", "system catalog"),
    "a view of the system's": ("", "SELECT usename::text AS tenant_id FROM pg_user", "system catalog"),
    "the information schema": (
        "",
        "SELECT table_name::text AS tenant_id FROM information_schema.tables",
        "system catalog",
    ),
    "a catalog in a subquery": ("", ROWS.format("(SELECT count(*) FROM pg_proc)"), "system catalog"),
    "a sequence": ("CREATE SEQUENCE shop.seq", ROWS.format("(SELECT last_value FROM shop.seq)"), "seq .* a sequence"),
    "an unlogged partition": (
        """CREATE TABLE shop.part (tenant_id text, id int) PARTITION BY RANGE (id);
           CREATE UNLOGGED TABLE shop.part_1 PARTITION OF shop.part FOR VALUES FROM (0) TO (9)""",
        "SELECT tenant_id, count(*) FROM shop.part GROUP BY 1",
        "part_1 is unlogged",
    ),
    "a foreign partition": (
        FOREIGN,
        "SELECT tenant_id, count(*) FROM shop.part GROUP BY 1",
        "part_1 is a foreign table",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_relation_that_no_trigger_covers_is_refused_with_its_cause(
    shop: Database, superuser: AsyncConnection[Any], case: str
) -> None:
    arrangement, query, cause = REFUSED[case]
    await arranged(superuser, "")
    if arrangement:
        await superuser.execute(arrangement)
        await superuser.execute("GRANT SELECT ON ALL TABLES IN SCHEMA shop TO listener_service")
        await superuser.execute("GRANT SELECT ON ALL SEQUENCES IN SCHEMA shop TO listener_service, listener_owner")
        await superuser.execute("GRANT SELECT ON ALL TABLES IN SCHEMA shop TO listener_owner")
    before = await rows(superuser, TRACES)
    with pytest.raises(psycopg.Error, match=cause) as raised:
        await managed(shop, query, tenants_query="SELECT 't1'")
    assert raised.value.sqlstate == "LSN03"
    assert await rows(superuser, TRACES) == before
