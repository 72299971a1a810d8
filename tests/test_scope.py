"""tenant_scope: what is proven does not depend on other tenants' rows, with row-level security or without.

What is not proven, or read whole, says what mends it; create_view warns of both, and of what depends on the time.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import TENANTS, one, rows
from trade import QUERIES, SCHEMA, SECURED, some_query

pytestmark = pytest.mark.anyio


@pytest.fixture
async def trade(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """The superuser, where the tables and their look-up are."""
    async with database.connect() as superuser:
        await superuser.execute(SCHEMA.encode())
        await superuser.execute(
            "SELECT listener.add_source('trade.lines', through => 'trade.orders', columns => '{order_id}',"
            " references_columns => '{id}')"
        )
        yield superuser


async def secure(superuser: AsyncConnection[Any]) -> None:
    """Forced row-level security, whose policies raise an error where no tenant is set."""
    for name in SECURED:
        table = sql.Identifier("trade", name)
        await superuser.execute(
            sql.SQL(
                "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
                "CREATE POLICY tenant ON {table} USING (tenant_id = current_setting('app.current_tenant_id')::uuid)"
            ).format(table=table)
        )


async def scope(superuser: AsyncConnection[Any], query: str, tenant_type: str = "uuid") -> list[Any]:
    """What tenant_scope says of it, asked by the migrating role."""
    await superuser.execute("SET ROLE listener_owner; SET search_path = trade, listener")
    await superuser.execute("DROP VIEW IF EXISTS trade.asked")
    await superuser.execute(f"CREATE VIEW trade.asked WITH (security_invoker) AS {query}".encode())
    await superuser.execute("GRANT SELECT ON trade.asked TO listener_service; RESET ROLE; RESET search_path")
    await superuser.execute("SET ROLE listener_owner")
    found = await rows(
        superuser,
        "SELECT source::text, proven, indexed, advice FROM listener.tenant_scope('trade.asked', 'tenant_id', %s)",
        tenant_type,
    )
    await superuser.execute("RESET ROLE")
    return found


@pytest.mark.parametrize("secured", [False, True], ids=["open", "secured"])
async def test_the_verdict_on_many_queries(trade: AsyncConnection[Any], *, secured: bool) -> None:
    if secured:
        await secure(trade)
    wrong = []
    for name, (expected, query) in QUERIES.items():
        found = await scope(trade, query)
        if expected is not None and all(row[1] for row in found) is not expected:
            wrong.append((name, found))
        assert all(row[3] for row in found if not row[1]), "what is not proven says what mends it"
    assert wrong == []


async def fill(superuser: AsyncConnection[Any], chance: random.Random) -> None:
    """Random rows; few values, so that tenants share them."""
    tenants = [f"'{tenant}'" for tenant in TENANTS]

    def number() -> int:
        return chance.randint(0, 3)

    def some(row: Any) -> str:
        return ", ".join(f"({', '.join(map(str, row(key)))})" for key in range(chance.randint(4, 9)))

    product = ("'x'", "'y'", "NULL")
    for table, row in {
        "tenants": None,
        "orders": lambda key: (key, chance.choice(tenants), chance.choice(product), number()),
        "payments": lambda key: (key, chance.choice(tenants), number(), chance.choice(product), number()),
        "lines": lambda key: (key, chance.randint(0, 6), number()),
        "invoices": lambda key: (key, chance.choice(tenants), number()),
        "texts": lambda key: (key, chance.choice(tenants), number()),
        "numbers": lambda key: (key, number(), number()),
        "parts": lambda key: (key, chance.choice(tenants), chance.choice(product), number()),
        "nodes": lambda key: (key, chance.choice(tenants), chance.choice(("NULL", number()))),
    }.items():
        values = some(row) if row else ", ".join(f"({tenant}, 'x')" for tenant in tenants)
        await superuser.execute(f"INSERT INTO trade.{table} VALUES {values}".encode())  # noqa: S608
    await superuser.execute("INSERT INTO trade.rates VALUES ('x', 2)")


async def depends_on_others(superuser: AsyncConnection[Any], query: str) -> bool:
    """Whether the rows of some tenant are others when the other tenants have none; seen from the schema's path."""
    asked = sql.SQL("SELECT a::text FROM ({}) a WHERE tenant_id = %s").format(sql.SQL(query.replace("%", "%%")))
    for tenant in TENANTS:
        among_all = Counter(await rows(superuser, asked, tenant))
        async with superuser.transaction(force_rollback=True):
            await superuser.execute(
                "DELETE FROM lines WHERE order_id NOT IN (SELECT id FROM orders WHERE tenant_id = %s)", (tenant,)
            )
            for table in ("orders", "payments", "invoices", "parts", "nodes", "texts"):
                column = "account" if table == "invoices" else "tenant_id"
                await superuser.execute(
                    sql.SQL("DELETE FROM {} WHERE {}::text <> %s").format(
                        sql.Identifier(table), sql.Identifier(column)
                    ),
                    (tenant,),
                )
            if among_all != Counter(await rows(superuser, asked, tenant)):
                return True
    return False


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_proven_does_not_depend_on_other_tenants_rows(trade: AsyncConnection[Any], seed: int) -> None:
    await fill(trade, random.Random(seed))
    await trade.execute("SET search_path = trade, listener")
    depends = {name for name, (_, query) in QUERIES.items() if await depends_on_others(trade, query)}
    assert [name for name in depends if QUERIES[name][0]] == []
    assert len(depends) > 15, "the data tells a query of all from one by tenant"


async def test_what_is_proven_of_random_queries_does_not_either(trade: AsyncConnection[Any]) -> None:
    seed = int(os.environ.get("LISTENER_TEST_SEED") or random.randrange(2**32))
    print("LISTENER_TEST_SEED", seed)
    chance = random.Random(seed)
    await fill(trade, chance)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for _ in range(int(os.environ.get("LISTENER_TEST_EXAMPLES", "25")) * 4):
        query = some_query(chance)
        proven = all(row[1] for row in await scope(trade, query))
        await trade.execute("SET search_path = trade, listener")
        depends = await depends_on_others(trade, query)
        assert not (proven and depends), query
        verdicts[proven, depends] += 1
    print(dict(verdicts))
    assert verdicts[True, False]
    assert verdicts[False, True]


TYPES: dict[str, tuple[str, bool, str]] = {
    "a varchar": ("text", True, "SELECT tenant_id, sum(n) FROM texts GROUP BY 1"),
    "an integer": ("integer", True, "SELECT tenant_id, sum(n) FROM numbers GROUP BY 1"),
    "an integer as a bigint": ("bigint", True, "SELECT tenant_id::bigint AS tenant_id, sum(n) FROM numbers GROUP BY 1"),
    "a uuid as a text": ("text", True, "SELECT tenant_id::text AS tenant_id, sum(n) FROM orders GROUP BY 1"),
    "an integer as a text": ("text", True, "SELECT tenant_id::text AS tenant_id, sum(n) FROM numbers GROUP BY 1"),
    "a text as an integer": ("integer", True, "SELECT tenant_id::int AS tenant_id, sum(n) FROM texts GROUP BY 1"),
    # '07' and '7' are two tenants.
    "a text by way of an integer": (
        "text",
        False,
        "SELECT tenant_id::int::text AS tenant_id, sum(n) FROM texts GROUP BY 1",
    ),
    "a shortened text": ("text", False, "SELECT tenant_id::varchar(3) AS tenant_id, sum(n) FROM texts GROUP BY 1"),
    "a text in lower case": ("text", False, "SELECT lower(tenant_id) AS tenant_id, sum(n) FROM texts GROUP BY 1"),
    "an integer that is rounded": (
        "integer",
        False,
        "SELECT tenant_id / 10 AS tenant_id, sum(n) FROM numbers GROUP BY 1",
    ),
    "an integer and a text": (
        "integer",
        True,
        """SELECT o.tenant_id, (SELECT sum(t.n) FROM texts t WHERE t.tenant_id = o.tenant_id::text) FROM numbers o""",
    ),
    "a text that looks like the constant": (
        "text",
        False,
        """SELECT t.tenant_id, (SELECT count(*) FROM texts s WHERE s.tenant_id = 'K' OR 'K'::text = 'K')
           FROM texts t""",
    ),
}


@pytest.mark.parametrize("case", TYPES)
async def test_casts_that_keep_tenants_apart_do_not_matter(trade: AsyncConnection[Any], case: str) -> None:
    tenant_type, proven, query = TYPES[case]
    assert all(row[1] for row in await scope(trade, query, tenant_type)) is proven


async def test_a_collation_that_takes_two_tenants_for_one_proves_nothing(trade: AsyncConnection[Any]) -> None:
    await trade.execute(
        # Not every server is built with ICU, which such collations come from.
        """CREATE COLLATION trade.same (locale = 'C');
           UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'same';
           ALTER TABLE trade.texts ALTER tenant_id TYPE varchar COLLATE trade.same"""
    )
    assert not (await scope(trade, "SELECT tenant_id, n FROM texts", "text"))[0][1]


async def test_the_verdict_is_the_same_for_a_materialized_view(trade: AsyncConnection[Any]) -> None:
    await trade.execute("SET ROLE listener_owner")
    await trade.execute("CREATE MATERIALIZED VIEW trade.fine AS SELECT tenant_id, sum(n) FROM trade.orders GROUP BY 1")
    ask = "SELECT bool_and(proven) FROM listener.tenant_scope(%s, 'tenant_id', 'uuid')"
    assert await one(trade, ask, "trade.fine") is True
    assert await one(trade, ask, "trade.stored") is False


async def test_tables_of_one_name_are_told_apart_or_not_proven(trade: AsyncConnection[Any]) -> None:
    await trade.execute("CREATE SCHEMA other AUTHORIZATION listener_owner; SET ROLE listener_owner")
    await trade.execute(
        """CREATE TABLE other.orders (tenant_id uuid, n int);
           GRANT USAGE ON SCHEMA other TO listener_service; GRANT SELECT ON other.orders TO listener_service"""
    )
    query = "SELECT o.tenant_id, x.n FROM trade.orders o JOIN other.orders x ON {}"
    assert all(row[1] for row in await scope(trade, query.format("x.tenant_id = o.tenant_id")))
    assert not all(row[1] for row in await scope(trade, query.format("x.n = o.n")))
    await trade.execute("RESET ROLE")
    await secure(trade)
    found = await scope(trade, query.format("x.tenant_id = o.tenant_id"))
    assert [(row[1], "two" in row[3]) for row in found] == [(False, True)]
    assert await one(trade, "SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0


async def test_what_is_read_whole_names_the_index_that_serves(trade: AsyncConnection[Any]) -> None:
    query = """SELECT o.tenant_id, o.id, l.n, p.n AS m, q.n AS k FROM orders o JOIN lines l ON l.order_id = o.id
               JOIN payments p ON p.tenant_id = o.tenant_id JOIN parts q ON q.tenant_id = o.tenant_id"""
    assert all(row[1:] == (True, True, None) for row in await scope(trade, query))
    await trade.execute(
        "DROP INDEX trade.orders_tenant_id_idx, trade.lines_order_id_idx, trade.parts_tenant_id_idx;"
        # It is no first column here, and a partial index has not all rows.
        "CREATE INDEX ON trade.orders (n, tenant_id); CREATE INDEX ON trade.parts (tenant_id) WHERE n > 1"
    )
    await secure(trade)
    found = {row[0]: row[1:] for row in await scope(trade, query)}
    assert found == {
        "trade.orders": (
            True,
            False,
            "trade.orders is read whole for each tenant: CREATE INDEX ON trade.orders (tenant_id)",
        ),
        "trade.lines": (
            True,
            False,
            "trade.lines is read whole for each tenant: CREATE INDEX ON trade.lines (order_id)",
        ),
        "trade.parts": (
            True,
            False,
            "trade.parts is read whole for each tenant: CREATE INDEX ON trade.parts (tenant_id)",
        ),
        "trade.payments": (True, True, None),
    }
    for _, _, advice in found.values():
        if advice:
            await trade.execute(advice.partition(": ")[2].encode())
    assert all(row[1:] == (True, True, None) for row in await scope(trade, query))
    cast = await scope(trade, "SELECT tenant_id::text AS tenant_id, n FROM orders", "text")
    assert cast[0][1:3] == (True, False)
    assert "without casts and functions" in cast[0][3]


async def test_a_column_of_another_name_is_offered_as_the_tenants(trade: AsyncConnection[Any]) -> None:
    query = "SELECT account AS tenant_id, sum(n) AS n FROM invoices GROUP BY 1"
    source, proven, _, advice = (await scope(trade, query))[0]
    assert (source, proven) == ("trade.invoices", True)
    await trade.execute(advice.partition(": ")[2].encode())
    assert (await scope(trade, query))[0][1:] == (
        True, False, "trade.invoices is read whole for each tenant: CREATE INDEX ON trade.invoices (account)"
    )  # fmt: skip
    assert await scope(trade, "SELECT o.tenant_id, i.n FROM orders o JOIN invoices i USING (n)") != []


ADVICE = {
    "rank of all": "PARTITION BY orders.tenant_id",
    "join without the tenant": "p.tenant_id = the other's",
    "with, twice": "WITH x AS NOT MATERIALIZED",
    "limit": "LIMIT counts all tenants' rows",
    "distinct on something else": "DISTINCT ON (orders.tenant_id",
    "a scalar subquery of all": "add WHERE payments.tenant_id",
    "a scalar subquery by product": "add AND p.tenant_id",
    "groups without the tenant": "GROUP BY orders.tenant_id",
    "with, recursive": "recursive",
    "except": "EXCEPT",
    "union all, one arm a literal's": "names by a literal",
    "a materialized view": "read the tables that it is made of",
    "a function": "depends_on",
}


async def test_what_is_not_proven_says_what_mends_it(trade: AsyncConnection[Any]) -> None:
    for name, part in ADVICE.items():
        found = await scope(trade, QUERIES[name][1])
        assert any(part in row[3] for row in found if not row[1]), (name, found)


async def test_create_view_warns_of_what_will_be_regretted(trade: AsyncConnection[Any], database: Database) -> None:
    await trade.execute(
        "GRANT listener_owner TO listener_migrator; GRANT CREATE, USAGE ON SCHEMA trade TO listener_owner"
    )
    await trade.execute("DROP INDEX trade.payments_tenant_id_idx; ALTER TABLE trade.orders ADD at timestamptz")
    warnings: list[tuple[str, str]] = []
    async with database.connect("listener_migrator") as migrator:
        migrator.add_notice_handler(
            lambda notice: (
                warnings.append((str(notice.message_primary), str(notice.message_hint)))
                if notice.severity == "WARNING"
                else None
            )
        )

        async def create(name: str, query: str, **options: Any) -> list[tuple[str, str]]:
            warnings.clear()
            arguments = sql.SQL(", ").join(
                sql.SQL("{} => {}").format(sql.Identifier(key), sql.Literal(value)) for key, value in options.items()
            )
            await migrator.execute(
                sql.SQL("SELECT listener.create_view({}, {}{}{})").format(
                    sql.Literal(f"trade.{name}"), sql.Literal(query), sql.SQL(", " if options else ""), arguments
                )
            )
            return list(warnings)

        assert await create("fine", "SELECT tenant_id, id, n FROM trade.orders", key_columns=["id"]) == []
        ranked = await create("places", "SELECT tenant_id, id, rank() OVER (ORDER BY n) FROM trade.orders")
        assert [("not proven" in message, "PARTITION BY" in message) for message, _ in ranked] == [(True, True)]
        whole = await create("paid", "SELECT tenant_id, id FROM trade.payments")
        assert [message.partition(": ")[2] for message, _ in whole] == ["CREATE INDEX ON trade.payments (tenant_id)"]
        recent = "SELECT tenant_id, id FROM trade.orders WHERE at > now() - interval '90 days'"
        assert [hint for _, hint in await create("recent", recent)] == [
            "max_age => '1 min' refreshes each key at least so often."
        ]
        assert await create("recent_2", recent, max_age="1 min") == []
        assert "random()" in (await create("chance", "SELECT tenant_id, id, random() AS r FROM trade.orders"))[0][0]
        places = "SELECT tenant_id, id, rank() OVER (ORDER BY n) FROM trade.orders"
        assert await create("everybody", places, tenant_column=None) == []


TIMES: dict[str, tuple[str, list[tuple[str, str, str | None]]]] = {
    "none": ("SELECT n, upper('now()') AS x FROM trade.orders", []),
    "now": ("SELECT 1 AS x FROM trade.orders WHERE at > now() - interval '1 day'", [
        ("time", "now()", "0:01:00"),
        ("time zone", "timestamptz_mi_interval(timestamp with time zone,interval)", None)]),
    "a day": ("SELECT 1 AS x FROM trade.orders WHERE day > CURRENT_DATE - 90", [("time", "CURRENT_DATE", "1:00:00")]),
    "now, cut to a day": (
        "SELECT 1 AS x FROM trade.orders WHERE day > (now() AT TIME ZONE 'UTC')::date", [("time", "now()", "1:00:00")]),
    "both": ("SELECT now() AS x FROM trade.orders WHERE day > (now() AT TIME ZONE 'UTC')::date", [
        ("time", "now()", "0:01:00")]),
    "a moment": ("SELECT LOCALTIMESTAMP AS x, clock_timestamp() AS y", [
        ("time", "LOCALTIMESTAMP", "0:01:00"), ("time", "clock_timestamp()", "0:01:00")]),
    "an age": ("SELECT age(day::timestamp) AS x FROM trade.orders", [("time", "age()", "1:00:00")]),
    "a zone": ("SELECT at::date AS x FROM trade.orders", [("time zone", "date(timestamp with time zone)", None)]),
    "a zone that is named": ("SELECT (at AT TIME ZONE 'UTC')::date AS x FROM trade.orders", []),
    "chance": ("SELECT random() AS x, gen_random_uuid() AS y", [
        ("volatile", "gen_random_uuid()", None), ("volatile", "random()", None)]),
    "a nested view": ("SELECT * FROM trade.moment", [("time", "now()", "0:01:00")]),
    "a function of SQL": ("SELECT trade.today() AS x", [("time", "now()", "1:00:00")]),
    "a function of text": ("SELECT trade.today_2() AS x", [("time", "CURRENT_DATE", "1:00:00")]),
    "a function that says too little": ("SELECT trade.one() AS x", [("volatile", "trade.one()", None)]),
}  # fmt: skip


@pytest.mark.parametrize("case", TIMES)
async def test_what_changes_with_no_write_is_found(trade: AsyncConnection[Any], case: str) -> None:
    query, expected = TIMES[case]
    await trade.execute(
        """ALTER TABLE trade.orders ADD at timestamptz, ADD day date;
           CREATE VIEW trade.moment AS SELECT now() AS x;
           CREATE FUNCTION trade.today() RETURNS date LANGUAGE sql STABLE RETURN (now() AT TIME ZONE 'UTC')::date;
           CREATE FUNCTION trade.today_2() RETURNS date LANGUAGE plpgsql STABLE AS
               'BEGIN /* not now() */ RETURN current_date; -- nor now()
                END';
           CREATE FUNCTION trade.one() RETURNS int LANGUAGE sql AS 'SELECT 1'"""
    )
    await trade.execute(f"CREATE VIEW trade.asked AS {query}".encode())
    found = await rows(trade, "SELECT dependence, what, max_age FROM listener.time_dependence('trade.asked')")
    assert [(row[0], row[1], row[2] and str(row[2])) for row in found] == expected
