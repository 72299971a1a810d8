"""undetermined(): what in a query may come out in more than one right way, and what only looks so."""

# ruff: noqa: E501 - the queries are a line each

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import rows

pytestmark = pytest.mark.anyio

SCHEMA = """
CREATE TABLE customers (id int PRIMARY KEY, tenant_id text NOT NULL, name text NOT NULL, UNIQUE (tenant_id, name));
CREATE TABLE orders (id int PRIMARY KEY, tenant_id text NOT NULL, customer_id int, n int, price float8, code text UNIQUE);
CREATE TABLE lines (order_id int NOT NULL, number int NOT NULL, n int, weight real, PRIMARY KEY (order_id, number));
CREATE VIEW named AS SELECT o.id, o.tenant_id, o.n, c.name FROM orders o LEFT JOIN customers c ON c.id = o.customer_id;
CREATE VIEW latest AS SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders ORDER BY tenant_id, n;
"""

TIES: dict[str, tuple[str, list[str]]] = {
    # -- gathered values
    "array_agg": ("SELECT tenant_id, array_agg(id) FROM orders GROUP BY 1", ["array_agg() takes"]),
    "array_agg, ordered": ("SELECT tenant_id, array_agg(n ORDER BY id) FROM orders GROUP BY 1", []),
    "array_agg, ordered by itself": ("SELECT tenant_id, array_agg(n ORDER BY n) FROM orders GROUP BY 1", []),
    "array_agg, ordered with ties": ("SELECT tenant_id, array_agg(id ORDER BY n) FROM orders GROUP BY 1", ["within array_agg()"]),
    "array_agg, distinct": ("SELECT tenant_id, array_agg(DISTINCT n) FROM orders GROUP BY 1", []),
    "string_agg": ("SELECT tenant_id, string_agg(code, ',') FROM orders GROUP BY 1", ["string_agg() takes"]),
    "string_agg, ordered": ("SELECT tenant_id, string_agg(code, ',' ORDER BY code) FROM orders GROUP BY 1", []),
    "json_agg": ("SELECT tenant_id, json_agg(id), jsonb_agg(n ORDER BY n) FROM orders GROUP BY 1", ["json_agg() takes"]),
    "jsonb_object_agg": ("SELECT tenant_id, jsonb_object_agg(n, id) FROM orders GROUP BY 1", ["jsonb_object_agg() takes"]),
    "a subquery that is ordered": (
        "SELECT tenant_id, array_agg(id) FROM (SELECT * FROM orders ORDER BY id) o GROUP BY 1", []),
    "a subquery within": (
        "SELECT tenant_id, (SELECT array_agg(l.n) FROM lines l WHERE l.order_id = o.id) FROM orders o", ["array_agg() takes"]),
    "a filter": ("SELECT tenant_id, count(*) FILTER (WHERE n > 1), max(n), bool_or(n > 2) FROM orders GROUP BY 1", []),
    # -- floats
    "sum of floats": ("SELECT tenant_id, sum(price) FROM orders GROUP BY 1", ["sum() of floats"]),
    "average of reals": (
        "SELECT o.tenant_id, avg(l.weight) FROM orders o JOIN lines l ON l.order_id = o.id GROUP BY 1", ["avg() of floats"]),
    "sum of numeric": ("SELECT tenant_id, sum(price::numeric), avg(n), max(price) FROM orders GROUP BY 1", []),
    "floats in a window": ("SELECT tenant_id, id, sum(price) OVER (PARTITION BY tenant_id) FROM orders", ["sum() of floats"]),
    # -- windows
    "row_number": ("SELECT tenant_id, id, row_number() OVER (PARTITION BY tenant_id ORDER BY n) FROM orders", ["row_number()"]),
    "row_number, unique": ("SELECT tenant_id, id, row_number() OVER (PARTITION BY tenant_id ORDER BY n, id) FROM orders", []),
    "row_number, no order": ("SELECT tenant_id, id, row_number() OVER (PARTITION BY tenant_id) FROM orders", ["row_number()"]),
    "row_number of what is shown": ("SELECT tenant_id, n, row_number() OVER (PARTITION BY tenant_id ORDER BY n) FROM orders", []),
    "rank": ("SELECT tenant_id, id, rank() OVER (PARTITION BY tenant_id ORDER BY n) FROM orders", []),
    "lag": ("SELECT tenant_id, id, lag(n) OVER (PARTITION BY tenant_id ORDER BY n) FROM orders", ["lag()"]),
    "a running sum": ("SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id ORDER BY n) FROM orders", []),
    "a running sum by rows": (
        "SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id ORDER BY n ROWS UNBOUNDED PRECEDING) FROM orders", ["sum()"]),
    "all rows": (
        """SELECT tenant_id, id, sum(n) OVER (PARTITION BY tenant_id ORDER BY n
           ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) FROM orders""", []),
    "a window over groups": (
        "SELECT tenant_id, n, row_number() OVER (PARTITION BY tenant_id ORDER BY count(*) DESC, n) FROM orders GROUP BY tenant_id, n", []),
    "a window over groups, ties": (
        "SELECT tenant_id, n, row_number() OVER (PARTITION BY tenant_id ORDER BY count(*)) FROM orders GROUP BY tenant_id, n", ["row_number()"]),
    # -- DISTINCT ON and LIMIT
    "distinct on": ("SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders ORDER BY tenant_id, n", ["DISTINCT ON"]),
    "distinct on, no order": ("SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders", ["DISTINCT ON"]),
    "distinct on, unique": ("SELECT DISTINCT ON (tenant_id) tenant_id, n FROM orders ORDER BY tenant_id, n, id", []),
    "distinct on, all that is shown": ("SELECT DISTINCT ON (tenant_id) tenant_id, n FROM orders ORDER BY tenant_id, n", []),
    "distinct on, another unique column": (
        "SELECT DISTINCT ON (tenant_id) tenant_id, id FROM customers ORDER BY tenant_id, name", []),
    "distinct on, unique but for NULL": (
        "SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders ORDER BY tenant_id, code", ["DISTINCT ON"]),
    "distinct on, joined by key": (
        """SELECT DISTINCT ON (o.tenant_id) o.tenant_id, c.name FROM orders o JOIN customers c ON c.id = o.customer_id
           ORDER BY o.tenant_id, o.id""", []),
    "distinct on, left joined by key": (
        """SELECT DISTINCT ON (o.tenant_id) o.tenant_id, c.name FROM orders o LEFT JOIN customers c ON c.id = o.customer_id
           ORDER BY o.tenant_id, o.id""", []),
    "distinct on, joined to many": (
        """SELECT DISTINCT ON (o.tenant_id) o.tenant_id, l.n FROM orders o JOIN lines l ON l.order_id = o.id
           ORDER BY o.tenant_id, o.id""", ["DISTINCT ON"]),
    "distinct on, joined to many, all of the key": (
        """SELECT DISTINCT ON (o.tenant_id) o.tenant_id, l.n FROM orders o JOIN lines l ON l.order_id = o.id
           ORDER BY o.tenant_id, o.id, l.number""", []),
    "distinct on, the other side of an outer join": (
        """SELECT DISTINCT ON (o.tenant_id) o.tenant_id, o.id, c.id AS c FROM orders o LEFT JOIN customers c ON c.id = o.id
           ORDER BY o.tenant_id, c.id""", ["DISTINCT ON"]),
    "distinct on, of groups": (
        """SELECT DISTINCT ON (tenant_id) tenant_id, n FROM (SELECT tenant_id, n, count(*) AS k FROM orders GROUP BY 1, 2) g
           ORDER BY tenant_id, k DESC, n""", []),
    "distinct on, of groups, ties": (
        """SELECT DISTINCT ON (tenant_id) tenant_id, n FROM (SELECT tenant_id, n, count(*) AS k FROM orders GROUP BY 1, 2) g
           ORDER BY tenant_id, k DESC""", ["DISTINCT ON"]),
    "distinct on, of a view": ("SELECT DISTINCT ON (tenant_id) tenant_id, name FROM named ORDER BY tenant_id, id", []),
    "distinct on, of a with": (
        """WITH w AS (SELECT DISTINCT tenant_id, n FROM orders)
           SELECT DISTINCT ON (tenant_id) * FROM w ORDER BY tenant_id, n""", []),
    "a nested view": ("SELECT * FROM latest", ["DISTINCT ON"]),
    "limit": (
        """SELECT c.tenant_id, o.id FROM customers c CROSS JOIN LATERAL (
           SELECT id FROM orders WHERE customer_id = c.id ORDER BY n LIMIT 1) o""", ["LIMIT"]),
    "limit, unique": (
        """SELECT c.tenant_id, o.id FROM customers c CROSS JOIN LATERAL (
           SELECT id FROM orders WHERE customer_id = c.id ORDER BY n, id LIMIT 1) o""", []),
    "limit, of lines": (
        """SELECT o.tenant_id, l.n FROM orders o CROSS JOIN LATERAL (
           SELECT n FROM lines WHERE order_id = o.id ORDER BY number LIMIT 1) l""", []),
    "limit, of what is shown": ("SELECT tenant_id, (SELECT n FROM lines l WHERE l.order_id = o.id ORDER BY n LIMIT 1) FROM orders o", []),
    "limit with ties": (
        """SELECT c.tenant_id, o.id FROM customers c CROSS JOIN LATERAL (
           SELECT id FROM orders WHERE customer_id = c.id ORDER BY n FETCH FIRST 1 ROW WITH TIES) o""", []),
    "limit, whether there is one": (
        "SELECT tenant_id, id FROM customers c WHERE EXISTS (SELECT 1 FROM orders o WHERE o.customer_id = c.id LIMIT 1)", []),
    "limit, of a union": (
        """SELECT c.tenant_id, u.n FROM customers c CROSS JOIN LATERAL (
           SELECT n FROM orders WHERE customer_id = c.id UNION SELECT c.id ORDER BY n LIMIT 1) u""", []),
    # -- names that could be taken for something else
    "odd names": (
        "SELECT tenant_id, n AS \":n\", 'it''s {QUERY :hasDistinctOn true} (x)' AS \"a { b ) \\ c\" FROM orders", []),
}  # fmt: skip


@pytest.fixture
async def tables(database: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """The superuser, where the tables are."""
    async with database.connect() as superuser:
        await superuser.execute(SCHEMA)
        yield superuser


async def test_ties_are_found_and_what_has_none_is_not_reported(tables: AsyncConnection[Any]) -> None:
    wrong = []
    for name, (query, expected) in TIES.items():
        await tables.execute(f"CREATE OR REPLACE VIEW asked AS {query}; ".encode())
        found = [row[0] for row in await rows(tables, "SELECT what FROM listener.undetermined('asked') ORDER BY 1")]
        if len(found) != len(expected) or not all(part in what for part, what in zip(expected, found, strict=True)):
            wrong.append((name, found))
        await tables.execute("DROP VIEW asked")
    assert wrong == []


async def test_the_stored_query_can_be_read(tables: AsyncConnection[Any]) -> None:
    unread = await rows(
        tables,
        "SELECT ev_class::regclass::text FROM pg_rewrite WHERE listener.node_tree(ev_action::text) #>> '{0,node}' IS DISTINCT FROM 'QUERY'",
    )
    assert unread == []


async def test_registration_warns_with_the_fix(tables: AsyncConnection[Any], database: Database) -> None:
    await tables.execute(
        "GRANT CREATE, USAGE ON SCHEMA public TO listener_owner, listener_migrator; CREATE INDEX ON orders (tenant_id);"
        "GRANT SELECT ON orders TO listener_service, listener_owner; ALTER TABLE orders OWNER TO listener_owner"
    )
    warned: list[tuple[str, str]] = []
    async with database.connect("listener_migrator") as migrator:
        migrator.add_notice_handler(
            lambda notice: (
                warned.append((str(notice.message_primary), str(notice.message_hint)))
                if notice.severity == "WARNING"
                else None
            )
        )
        await migrator.execute(
            "SELECT listener.create_view('v', 'SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders ORDER BY tenant_id, n')"
        )
        await migrator.execute(
            "SELECT listener.create_view('w', 'SELECT DISTINCT ON (tenant_id) tenant_id, id FROM orders ORDER BY tenant_id, id')"
        )
    assert warned == [
        (
            "v may have more than one right result, and change although nothing was written: DISTINCT ON keeps any of the rows that its ORDER BY does not tell apart",
            "End its ORDER BY with a unique column.",
        )
    ]
