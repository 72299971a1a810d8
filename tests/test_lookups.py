"""Look-ups: order lines find their tenant through their order, under row-level security FORCEd on both."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, errors, sql

from conftest import Database
from shop import (
    ANNA,
    BERT,
    CLEO,
    SALES,
    TENANTS,
    application,
    create_view,
    define,
    differences,
    one,
    open_shop,
    order,
    rows,
    settle,
)

pytestmark = pytest.mark.anyio

LINES: LiteralString = """
CREATE TABLE shop.order_lines (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint REFERENCES shop.orders ON DELETE CASCADE,
    cents bigint NOT NULL);
CREATE INDEX ON shop.order_lines (order_id);
CREATE TABLE shop.discounts (
    line_id bigint NOT NULL REFERENCES shop.order_lines ON DELETE CASCADE,
    cents bigint NOT NULL);
ALTER TABLE shop.order_lines ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE shop.discounts ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON shop.order_lines USING (EXISTS (SELECT FROM shop.orders o WHERE o.id = order_id));
CREATE POLICY tenant ON shop.discounts USING (EXISTS (SELECT FROM shop.order_lines l WHERE l.id = line_id));
GRANT SELECT, INSERT, UPDATE, DELETE ON shop.order_lines, shop.discounts TO shop_app;
GRANT SELECT ON shop.order_lines, shop.discounts TO listener_service;
"""
TOTALS = """
    SELECT o.tenant_id, o.product, count(*) AS lines, sum(l.cents)::bigint AS cents
    FROM shop.order_lines l JOIN shop.orders o ON o.id = l.order_id GROUP BY 1, 2
"""
OFF = """
    SELECT o.tenant_id, sum(d.cents)::bigint AS cents FROM shop.discounts d
    JOIN shop.order_lines l ON l.id = d.line_id JOIN shop.orders o ON o.id = l.order_id GROUP BY 1
"""
# Of each tenant: order 1, 2, 3 with the lines 1, 2, 3.
ROWS: LiteralString = """
INSERT INTO shop.orders (tenant_id, product) SELECT id, 'tea' FROM shop.tenants ORDER BY id;
INSERT INTO shop.order_lines (order_id, cents) SELECT id, 100 FROM shop.orders ORDER BY id;
INSERT INTO shop.discounts SELECT id, 5 FROM shop.order_lines ORDER BY id;
"""
EVERYBODY: list[str] = sorted(TENANTS)


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, LINES)
        await superuser.execute(ROWS)
        await superuser.execute("SELECT listener.add_source('shop.order_lines', through => 'shop.orders')")
    await create_view(database, "totals", TOTALS, ["product"])
    await create_view(database, "sales", SALES, ["product"])
    async with database.connect("listener_service") as service:
        await settle(service)
    return database


async def dirtied(service: AsyncConnection[Any]) -> dict[str, list[str]]:
    """Drains; of each view, the tenants that became dirty, all of them as ''."""
    keys: dict[str, list[str]] = {}
    for view, tenant in await rows(service, "SELECT view_name, tenant FROM listener.drain() ORDER BY 1, 2"):
        if view is not None:
            keys.setdefault(view, []).append(tenant)
    return keys


async def is_exact(superuser: AsyncConnection[Any], service: AsyncConnection[Any], *views: str) -> None:
    """Refreshes what is dirty; then the targets show what the definitions say."""
    await settle(service)
    for view in views or ("totals", "sales"):
        assert await differences(superuser, view) == [], view


async def line(connection: AsyncConnection[Any], order_id: int | None, cents: int = 10) -> None:
    await connection.execute("INSERT INTO shop.order_lines (order_id, cents) VALUES (%s, %s)", (order_id, cents))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO shop.order_lines (order_id, cents) SELECT id, 7 FROM shop.orders",
        "UPDATE shop.order_lines SET cents = cents + 1",
        "DELETE FROM shop.order_lines",
        "MERGE INTO shop.order_lines l USING shop.orders o ON l.order_id = o.id WHEN MATCHED THEN UPDATE SET cents = 3",
    ],
    ids=["insert", "update", "delete", "merge"],
)
async def test_lines_that_a_tenant_writes_dirty_that_tenant_alone(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], statement: LiteralString
) -> None:
    async with application(shop, BERT) as app:
        await app.execute(statement)
    assert await dirtied(service) == {"totals": [BERT]}
    await is_exact(superuser, service)


async def test_a_batch_of_several_tenants_lines_dirties_exactly_those(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("INSERT INTO shop.order_lines (order_id, cents) VALUES (1, 1), (3, 1), (1, 2), (3, 2)")
    assert await dirtied(service) == {"totals": [ANNA, CLEO]}
    await superuser.execute("UPDATE shop.order_lines SET cents = 0 WHERE order_id IN (2, 3)")
    assert await dirtied(service) == {"totals": [BERT, CLEO]}
    await superuser.execute("DELETE FROM shop.order_lines WHERE order_id < 3")
    assert await dirtied(service) == {"totals": [ANNA, BERT]}
    await is_exact(superuser, service)


async def test_a_line_that_moves_to_another_tenants_order_dirties_both(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("UPDATE shop.order_lines SET order_id = 2 WHERE order_id = 1")
    assert await dirtied(service) == {"totals": [ANNA, BERT]}
    await is_exact(superuser, service)


async def test_a_line_without_an_order_dirties_all_tenants(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await line(superuser, None)
    assert await dirtied(service) == {"totals": [""]}
    await superuser.execute("UPDATE shop.order_lines SET order_id = 1 WHERE order_id IS NULL")
    assert await dirtied(service) == {"totals": ["", ANNA]}
    await line(superuser, None)
    await dirtied(service)
    # Though the foreign key cascades: nobody's order was deleted.
    await superuser.execute("DELETE FROM shop.order_lines WHERE order_id IS NULL OR order_id = 2")
    assert await dirtied(service) == {"totals": ["", BERT]}
    await is_exact(superuser, service)


async def test_a_line_whose_order_is_missing_dirties_all_tenants(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("SET session_replication_role = replica")  # no foreign key is looked at
    await line(superuser, 999)
    assert await dirtied(service) == {"totals": [""]}
    await is_exact(superuser, service)


async def test_a_line_of_an_order_without_a_tenant_dirties_all_tenants(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await order(superuser, None, "nobody's")
    await settle(service)
    await line(superuser, await one(superuser, "SELECT id FROM shop.orders WHERE tenant_id IS NULL"))
    assert await dirtied(service) == {"totals": [""]}


async def test_a_deleted_order_takes_its_lines_with_it_and_dirties_its_tenant_alone(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA) as app:
        await app.execute("DELETE FROM shop.orders")
    assert await one(superuser, "SELECT count(*) FROM shop.order_lines WHERE order_id = 1") == 0
    assert await dirtied(service) == {"sales": [ANNA], "totals": [ANNA]}
    await is_exact(superuser, service)


async def test_an_order_that_changes_tenant_takes_its_lines_with_it(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("UPDATE shop.orders SET tenant_id = %s WHERE id = 1", (CLEO,))
    assert await dirtied(service) == {"sales": [ANNA, CLEO], "totals": [ANNA, CLEO]}
    await is_exact(superuser, service)


async def test_an_order_and_its_line_of_one_statement_dirty_their_tenant(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """WITH made AS (INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'jam') RETURNING id)
           INSERT INTO shop.order_lines (order_id, cents) SELECT id, 9 FROM made""",
        (BERT,),
    )
    assert await dirtied(service) == {"sales": [BERT], "totals": [BERT]}
    await is_exact(superuser, service)


async def test_an_order_and_its_line_of_one_transaction_dirty_their_tenant(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with application(shop, BERT, autocommit=False) as app:
        await order(app, BERT, "jam")
        await line(app, await one(app, "SELECT max(id) FROM shop.orders"))
        await app.commit()
    assert await dirtied(service) == {"sales": [BERT], "totals": [BERT]}
    await is_exact(superuser, service)


async def test_copied_and_truncated_lines_are_captured(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with superuser.cursor() as cursor:
        async with cursor.copy("COPY shop.order_lines (order_id, cents) FROM STDIN") as copy:
            await copy.write_row((2, 11))
        assert await dirtied(service) == {"totals": [BERT]}
    await superuser.execute("TRUNCATE shop.order_lines CASCADE")
    assert await dirtied(service) == {"totals": [""]}
    await is_exact(superuser, service)


@pytest.fixture
async def discounts(shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]) -> None:
    await superuser.execute("SELECT listener.add_source('shop.discounts', through => 'shop.order_lines')")
    await create_view(shop, "off", OFF, [])
    await settle(service)


async def test_a_chain_of_look_ups_leads_to_the_tenant(
    shop: Database, discounts: None, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA) as app:
        await app.execute("UPDATE shop.discounts SET cents = 6")
    assert await dirtied(service) == {"off": [ANNA]}
    await superuser.execute("INSERT INTO shop.discounts VALUES (2, 1), (3, 1)")
    assert await dirtied(service) == {"off": [BERT, CLEO]}
    await superuser.execute("UPDATE shop.discounts SET line_id = 1 WHERE line_id = 2")
    assert await dirtied(service) == {"off": [ANNA, BERT]}
    await superuser.execute("UPDATE shop.order_lines SET order_id = 3 WHERE id = 1")
    assert await dirtied(service) == {"off": [ANNA, CLEO], "totals": [ANNA, CLEO]}
    await is_exact(superuser, service, "off", "totals", "sales")


@pytest.mark.parametrize("gone", ["shop.orders", "shop.order_lines"])
async def test_a_delete_that_cascades_down_the_chain_dirties_its_tenant_alone(
    gone: str, discounts: None, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute(sql.SQL("DELETE FROM {} WHERE id = 2").format(sql.Identifier(*gone.split("."))))
    touched = await dirtied(service)
    assert (touched["off"], touched["totals"]) == ([BERT], [BERT])
    assert await one(superuser, "SELECT count(*) FROM shop.discounts WHERE line_id = 2") == 0
    await is_exact(superuser, service, "off", "totals", "sales")


async def test_the_application_sees_no_more_than_before_and_cannot_read_the_look_up(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    lookup = await one(superuser, "SELECT relname FROM pg_class WHERE relname LIKE 'lookup\\_%'")
    assert await one(
        superuser, "SELECT polroles::regrole[]::text FROM pg_policy WHERE polname = 'listener_lookup'"
    ) == ("{listener_owner}")
    # Even where somebody lets it look into the schema.
    await superuser.execute("GRANT USAGE ON SCHEMA listener TO shop_app")
    for role in ("shop_app", "listener_service"):
        async with shop.connect(role) as connection:
            await connection.execute("SELECT set_config('app.current_tenant_id', %s, false)", (ANNA,))
            with pytest.raises(errors.InsufficientPrivilege):
                await connection.execute(sql.SQL("SELECT * FROM listener.{}").format(sql.Identifier(lookup)))
            with pytest.raises(errors.InsufficientPrivilege):
                await connection.execute("SET ROLE listener_owner")
            assert await rows(connection, "SELECT DISTINCT tenant_id::text FROM shop.orders") == [(ANNA,)]
            assert await rows(connection, "SELECT order_id FROM shop.order_lines") == [(1,)]
