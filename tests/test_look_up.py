"""Look-ups: an order line that finds its tenant through its order."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import ANNA, BERT, SALES, create_view, differences, one, open_shop, order, rows, settle

pytestmark = pytest.mark.anyio

LINES: LiteralString = """
    CREATE TABLE shop.lines (id bigint PRIMARY KEY, order_id bigint NOT NULL REFERENCES shop.orders ON DELETE CASCADE);
    ALTER TABLE shop.lines OWNER TO shop_owner;
    GRANT SELECT ON shop.lines TO listener_service;
"""
OF_LINES = "SELECT o.tenant_id, count(*) AS lines FROM shop.orders o JOIN shop.lines l ON l.order_id = o.id GROUP BY 1"


@pytest.fixture
async def shop(database: Database) -> Database:
    """One order of Anna's, that has no line yet."""
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute(LINES)
        await order(superuser, ANNA, "a")
    return database


async def look_up(shop: Database) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.add_source('shop.lines', through => 'shop.orders')")


@pytest.mark.parametrize("first", ["the look-up", "another view", "the view"])
async def test_a_look_up_is_added_before_and_after_the_views(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], first: str
) -> None:
    if first == "another view":
        await create_view(shop, "sales", SALES, ["product"])
    if first == "the view":
        await create_view(shop, "of_lines", OF_LINES, [])
    await look_up(shop)
    if first != "the view":
        await create_view(shop, "of_lines", OF_LINES, [])
    await look_up(shop)  # once more changes nothing
    await settle(service)
    await superuser.execute("INSERT INTO shop.lines SELECT 1, id FROM shop.orders")
    assert await rows(service, "SELECT tenant FROM listener.drain() WHERE view_name = 'of_lines'") == [(ANNA,)]
    await settle(service)
    assert await differences(superuser, "of_lines") == []
    assert await one(superuser, "SELECT lines FROM of_lines WHERE tenant_id = %s", ANNA) == 1


@pytest.mark.parametrize(
    "mover_commits",
    [
        "before the line",
        "after the line",
    ],
)
async def test_a_line_written_while_its_order_moves_is_shown(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], mover_commits: str
) -> None:
    await create_view(shop, "of_lines", OF_LINES, [])
    await look_up(shop)
    await settle(service)
    async with shop.connect(autocommit=False) as mover, shop.connect(autocommit=False) as writer:
        await mover.execute("UPDATE shop.orders SET tenant_id = %s", (BERT,))
        await writer.execute("INSERT INTO shop.lines SELECT 1, id FROM shop.orders")
        for connection in (mover, writer) if mover_commits == "before the line" else (writer, mover):
            await connection.commit()
            await settle(service)
    assert await differences(superuser, "of_lines") == []
