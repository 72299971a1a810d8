"""Columns and tables that a look-up reads, renamed, dropped or made anew under it."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection

from captured import FOLLOWS_RENAMES
from conftest import Database
from shop import ANNA, BERT, CLEO, SALES, application, create_view, define, open_shop, rows, settle
from test_add_source import THROUGH, add_source
from test_lookups import LINES, OFF, ROWS, TOTALS, dirtied, is_exact

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, LINES)
        await superuser.execute(ROWS)
    return database


RENAMES: LiteralString = """
ALTER TABLE shop.orders RENAME tenant_id TO account;
ALTER TABLE shop.orders RENAME id TO number;
ALTER TABLE shop.orders RENAME TO purchases;
ALTER TABLE shop.order_lines RENAME order_id TO purchase;
ALTER TABLE shop.order_lines RENAME id TO line;
ALTER TABLE shop.discounts RENAME line_id TO of_line;
"""


@pytest.mark.parametrize("repaired", [False, True], ids=["at once", "after the next sweep"])
async def test_renamed_columns_and_tables_break_no_write_and_stay_exact(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], *, repaired: bool
) -> None:
    await add_source(superuser, THROUGH)
    await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    await create_view(shop, "off", OFF, [])
    await create_view(shop, "sales", SALES, ["product"])
    await rows(service, "SELECT listener.repair_capture()")  # the database of a test is a copy of another
    await settle(service)
    await define(superuser, RENAMES)
    if repaired:
        assert await rows(service, "SELECT * FROM listener.repair_capture() WHERE outcome <> 'renamed'") == []
        assert await rows(service, "SELECT * FROM listener.repair_capture()") == []
        # What makes the functions anew, or the triggers.
        await superuser.execute("SELECT listener.set_notify('always'); SELECT listener.regenerate()")
        await define(superuser, "ALTER TABLE shop.discounts DISABLE TRIGGER USER")
        assert await rows(service, "SELECT outcome FROM listener.repair_capture()") == [("repaired",)]
        await settle(service)
    # A server that does not follow a rename takes such a row for anybody's until the next sweep.
    follows = repaired or superuser.info.server_version >= FOLLOWS_RENAMES
    async with application(shop, ANNA) as app:
        await app.execute("INSERT INTO shop.discounts (of_line, cents) VALUES (1, 3)")
    assert await dirtied(service) == {"off": [ANNA] if follows else [""]}
    await superuser.execute("UPDATE shop.order_lines SET purchase = 2 WHERE purchase = 3")
    assert await dirtied(service) == {"off": [BERT, CLEO] if follows else [""]}
    await superuser.execute("UPDATE shop.purchases SET account = %s WHERE number = 1", (BERT,))
    both = [ANNA, BERT] if follows else [""]
    assert await dirtied(service) == {"off": both, "sales": both}
    await is_exact(superuser, service, "off", "sales")


@pytest.mark.parametrize("repaired", [False, True], ids=["at once", "after the next sweep"])
async def test_a_source_is_added_again_after_the_columns_that_find_its_rows_were_renamed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], *, repaired: bool
) -> None:
    await add_source(superuser, THROUGH)
    await create_view(shop, "off", TOTALS, [])
    await rows(service, "SELECT listener.repair_capture()")
    await settle(service)
    await define(superuser, "ALTER TABLE shop.orders RENAME id TO number; ALTER TABLE shop.orders ADD id bigint")
    if repaired:
        assert await rows(service, "SELECT outcome FROM listener.repair_capture()") == [("renamed",)]
        assert await rows(service, "SELECT outcome FROM listener.repair_capture()") == []
    # Makes the look-up of the lines anew, by what the column is called now.
    await add_source(superuser, "'shop.orders', 'tenant_id'")
    await settle(service)
    await superuser.execute("UPDATE shop.order_lines SET cents = cents + 1 WHERE order_id = 1")
    assert await dirtied(service) == {"off": [ANNA]}
    await is_exact(superuser, service, "off")


LOSSES: list[LiteralString] = [
    "ALTER TABLE shop.orders DROP COLUMN tenant_id CASCADE",
    "ALTER TABLE shop.order_lines DROP COLUMN order_id CASCADE",
    "DROP TABLE shop.orders CASCADE",
]


WRITES: list[LiteralString] = [
    "INSERT INTO shop.order_lines (tenant_id, cents) SELECT id, 4 FROM shop.tenants",
    "UPDATE shop.order_lines SET cents = 5",
    "DELETE FROM shop.order_lines WHERE cents = 5",
]


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_look_up_that_is_gone_breaks_no_write_and_means_all_tenants(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], loss: LiteralString
) -> None:
    await define(superuser, "ALTER TABLE shop.order_lines ADD tenant_id uuid")
    await add_source(superuser, THROUGH)
    await create_view(shop, "own", "SELECT tenant_id, sum(cents)::bigint FROM shop.order_lines GROUP BY 1", [])
    await settle(service)
    # The definition reads none of what goes.
    await superuser.execute("DROP POLICY tenant ON shop.order_lines; DROP POLICY tenant ON shop.discounts")
    await define(superuser, "CREATE POLICY tenant ON shop.order_lines USING (true)")
    await define(superuser, loss)
    for statement in WRITES:
        await superuser.execute(statement)
        assert await dirtied(service) == {"own": [""]}
        # What makes the functions anew does not choke on it.
        await rows(service, "SELECT listener.repair_capture()")
        await superuser.execute("SELECT listener.set_notify('always')")
    await settle(service)
    await is_exact(superuser, service, "own")


async def test_a_table_that_is_made_anew_is_looked_through_again(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await add_source(superuser, THROUGH)
    await define(
        superuser,
        """
        DROP TABLE shop.orders CASCADE;
        CREATE TABLE shop.orders (id int PRIMARY KEY, tenant_id uuid, product text);
        GRANT SELECT ON shop.orders TO listener_service;
        CREATE POLICY tenant ON shop.order_lines USING (EXISTS (SELECT FROM shop.orders o WHERE o.id = order_id));
        """,
    )
    await superuser.execute("INSERT INTO shop.orders SELECT row_number() OVER (ORDER BY id), id, 'x' FROM shop.tenants")
    while await rows(service, "SELECT * FROM listener.repair_capture()"):
        pass
    await create_view(shop, "totals", TOTALS, ["product"])
    await settle(service)
    await superuser.execute("UPDATE shop.order_lines SET cents = 1 WHERE order_id = 2")
    assert await dirtied(service) == {"totals": [BERT]}
    await is_exact(superuser, service, "totals")


async def test_a_foreign_key_that_no_longer_cascades_is_noticed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, "ALTER TABLE shop.order_lines ADD tenant_id uuid")
    await add_source(superuser, THROUGH)
    await create_view(shop, "own", "SELECT tenant_id, sum(cents)::bigint FROM shop.order_lines GROUP BY 1", [])
    await superuser.execute(
        "UPDATE shop.order_lines l SET tenant_id = o.tenant_id FROM shop.orders o WHERE o.id = order_id"
    )
    await settle(service)
    await rows(service, "SELECT listener.repair_capture()")
    await define(
        superuser,
        """
        DROP POLICY tenant ON shop.order_lines;
        CREATE POLICY tenant ON shop.order_lines USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
        ALTER TABLE shop.order_lines DROP CONSTRAINT order_lines_order_id_fkey;
        """,
    )
    await superuser.execute("DELETE FROM shop.orders WHERE id < 3")
    await superuser.execute("DELETE FROM shop.order_lines WHERE order_id = 1")
    assert await rows(service, "SELECT outcome FROM listener.repair_capture()") == [("repaired",)]
    assert await rows(service, "SELECT * FROM listener.repair_capture()") == []
    await is_exact(superuser, service, "own")
    await superuser.execute("DELETE FROM shop.order_lines WHERE order_id = 2")
    assert await dirtied(service) == {"own": [""]}
    await is_exact(superuser, service, "own")
