"""listener.add_source: how a table's rows find their tenant where create_view cannot see it, and what is refused."""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import ANNA, BERT, CLEO, SALES, create_view, define, differences, one, open_shop, rows, settle
from test_lookups import LINES, OFF, ROWS, TOTALS, dirtied, is_exact

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, LINES)
        await superuser.execute(ROWS)
    return database


async def add_source(superuser: AsyncConnection[Any], arguments: LiteralString) -> None:
    await superuser.execute("SELECT listener.add_source(" + arguments + ")")


THROUGH: LiteralString = "'shop.order_lines', through => 'shop.orders'"


async def refused(superuser: AsyncConnection[Any], arguments: LiteralString, reason: str) -> None:
    """Refused, and nothing of it stays."""
    traces: LiteralString = (
        "SELECT array_agg(s.* ORDER BY s.id)::text, (SELECT count(*) FROM pg_trigger),"
        " (SELECT count(*) FROM pg_policy), (SELECT count(*) FROM pg_proc) FROM listener.source s"
    )
    before = await rows(superuser, traces)
    with pytest.raises(psycopg.Error, match=reason) as raised:
        await add_source(superuser, arguments)
    assert raised.value.sqlstate == "LSN03"
    assert await rows(superuser, traces) == before


async def test_a_look_up_may_be_added_before_the_view_or_after_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "early", TOTALS, ["product"])
    await settle(service)
    await superuser.execute("UPDATE shop.order_lines SET cents = 1 WHERE order_id = 1")
    assert await dirtied(service) == {"early": [""]}
    await add_source(superuser, THROUGH)
    # What was captured until now may have named too few.
    assert await dirtied(service) == {"early": [""]}
    await create_view(shop, "late", TOTALS, ["product"])
    await settle(service)
    await superuser.execute("UPDATE shop.order_lines SET cents = 2 WHERE order_id = 1")
    assert await dirtied(service) == {"early": [ANNA], "late": [ANNA]}
    await superuser.execute("DELETE FROM shop.orders WHERE id = 2")
    assert await dirtied(service) == {"early": [BERT], "late": [BERT]}
    await is_exact(superuser, service, "early", "late")


async def test_adding_the_same_look_up_again_changes_nothing(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    for _ in range(2):
        await add_source(superuser, THROUGH)
        await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    await create_view(shop, "off", OFF, [])
    await settle(service)
    await add_source(superuser, THROUGH)
    assert await one(superuser, "SELECT count(*) FROM listener.source") == 3
    await settle(service)
    await superuser.execute("UPDATE shop.discounts SET cents = 1 WHERE line_id = 3")
    assert await dirtied(service) == {"off": [CLEO]}
    await is_exact(superuser, service, "off")


ACCOUNTS: LiteralString = """
CREATE TABLE shop.bookings (id int PRIMARY KEY, account uuid);
CREATE TABLE shop.booking_lines (booking int, customer uuid, cents bigint);
CREATE TABLE shop.refunds (owner uuid, cents bigint);
INSERT INTO shop.bookings SELECT row_number() OVER (ORDER BY id), id FROM shop.tenants;
INSERT INTO shop.booking_lines SELECT id, account, 5 FROM shop.bookings;
INSERT INTO shop.refunds SELECT account, 2 FROM shop.bookings;
GRANT SELECT ON shop.bookings, shop.booking_lines, shop.refunds TO listener_service;
"""
NET = """
    SELECT s.account AS tenant_id, coalesce(sum(l.cents), 0)::bigint - coalesce((
               SELECT sum(r.cents) FROM shop.refunds r WHERE r.owner = s.account), 0)::bigint AS cents
    FROM shop.bookings s LEFT JOIN shop.booking_lines l ON l.booking = s.id GROUP BY 1
"""


@pytest.mark.parametrize("way", ["of its own", "through a key of another name"])
async def test_each_source_may_call_its_tenant_differently(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], way: str
) -> None:
    await define(superuser, ACCOUNTS + "GRANT SELECT ON shop.tenants TO listener_service;")
    await add_source(superuser, "'shop.refunds', 'owner'")
    if way == "of its own":
        await add_source(superuser, "'shop.booking_lines', 'customer'")
        await add_source(superuser, "'shop.bookings', 'account'")
    else:
        await add_source(
            superuser,
            "'shop.booking_lines', 'account', through => 'shop.bookings', columns => '{booking}',"
            " references_columns => '{id}'",
        )
    await create_view(shop, "net", NET, [])
    await settle(service)
    await superuser.execute("UPDATE shop.booking_lines SET cents = 6 WHERE booking = 1")
    assert await dirtied(service) == {"net": [ANNA]}
    await superuser.execute("UPDATE shop.refunds SET cents = 1 WHERE owner = %s", (BERT,))
    assert await dirtied(service) == {"net": [BERT]}
    await superuser.execute("DELETE FROM shop.booking_lines WHERE booking = 3")
    await superuser.execute("INSERT INTO shop.bookings VALUES (4, %s)", (CLEO,))
    assert await dirtied(service) == {"net": [CLEO]}
    await is_exact(superuser, service, "net")


async def test_a_deleted_parent_without_a_foreign_key_leaves_lines_that_may_be_anybodys(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, ACCOUNTS)
    await add_source(superuser, "'shop.refunds', 'owner'")
    await add_source(
        superuser,
        "'shop.booking_lines', 'account', 'shop.bookings', columns => '{booking}', references_columns => '{id}'",
    )
    await create_view(shop, "net", NET, [])
    await settle(service)
    await superuser.execute("DELETE FROM shop.bookings WHERE id = 1")
    assert await dirtied(service) == {"net": [ANNA]}
    await superuser.execute("DELETE FROM shop.booking_lines WHERE booking = 1")
    assert await dirtied(service) == {"net": [""]}
    await is_exact(superuser, service, "net")


async def test_a_look_up_follows_the_source_that_it_goes_through(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("ALTER TABLE shop.orders ADD account uuid; UPDATE shop.orders SET account = tenant_id")
    await define(
        superuser,
        "ALTER POLICY tenant ON shop.orders USING (account = current_setting('app.current_tenant_id', true)::uuid)",
    )
    await add_source(superuser, THROUGH)
    await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    await create_view(shop, "off", OFF.replace("o.tenant_id", "o.account AS tenant_id"), [])
    await settle(service)
    await superuser.execute("ALTER TABLE shop.orders DISABLE TRIGGER USER")
    await superuser.execute("UPDATE shop.orders SET account = %s WHERE id = 1", (CLEO,))
    await add_source(superuser, "'shop.orders', 'account'")
    await settle(service)
    await superuser.execute("UPDATE shop.discounts SET cents = 1 WHERE line_id = 1")
    assert await dirtied(service) == {"off": [CLEO]}
    await superuser.execute("UPDATE shop.order_lines SET cents = 1 WHERE id = 2")
    assert await dirtied(service) == {"off": [BERT]}
    await is_exact(superuser, service, "off")


async def test_what_does_not_lead_to_a_tenant_is_refused(superuser: AsyncConnection[Any]) -> None:
    await define(
        superuser,
        """
        CREATE TABLE shop.countries (id int PRIMARY KEY);
        CREATE TABLE shop.notes (
            id int, country int REFERENCES shop.countries,
            made_for bigint REFERENCES shop.orders, replaces bigint REFERENCES shop.orders);
        """,
    )
    await refused(superuser, "'shop.payments', through => 'shop.orders'", "has no foreign keys to shop.orders")
    await refused(superuser, "'shop.notes', through => 'shop.orders'", "has several foreign keys to shop.orders")
    await refused(superuser, "'shop.notes', through => 'shop.countries'", "has no column tenant_id")
    await refused(superuser, THROUGH + ", columns => '{nothing}', references_columns => '{id}'", "no column nothing")
    await refused(superuser, THROUGH + ", columns => '{order_id}', references_columns => '{nr}'", "no column nr")
    await refused(superuser, THROUGH + ", columns => '{order_id}'", "as many columns each")
    await refused(superuser, THROUGH + ", columns => '{}', references_columns => '{}'", "as many columns each")
    await add_source(superuser, "'shop.countries'")
    await refused(
        superuser, "'shop.notes', through => 'shop.countries'", "shop.countries has no tenant that shop.notes"
    )
    await add_source(
        superuser, "'shop.notes', through => 'shop.orders', columns => '{made_for}', references_columns => '{id}'"
    )


async def test_a_circle_of_look_ups_is_refused(superuser: AsyncConnection[Any]) -> None:
    await define(superuser, "ALTER TABLE shop.orders ADD first_line bigint REFERENCES shop.order_lines")
    await add_source(superuser, THROUGH)
    await refused(superuser, "'shop.orders', through => 'shop.order_lines'", "through itself")
    await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    await define(superuser, "ALTER TABLE shop.orders ADD discount bigint")
    await refused(
        superuser,
        "'shop.orders', through => 'shop.discounts', columns => '{discount}', references_columns => '{line_id}'",
        "through itself",
    )
    await refused(
        superuser,
        "'shop.orders', through => 'shop.orders', columns => '{discount}', references_columns => '{id}'",
        "through itself",
    )


async def test_a_restrictive_policy_in_the_way_is_refused(superuser: AsyncConnection[Any]) -> None:
    await define(superuser, "CREATE POLICY narrow ON shop.orders AS RESTRICTIVE USING (quantity < 100)")
    await refused(superuser, THROUGH, "restrictive policy")


async def test_a_look_up_is_refused_where_planning_it_would_call_the_function_of_a_policy(
    superuser: AsyncConnection[Any],
) -> None:
    await superuser.execute(
        """
        CREATE FUNCTION shop.always(int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN true; END';
        CREATE POLICY zealous ON shop.orders USING (shop.always(1));
        """
    )
    await refused(superuser, THROUGH, r"calls shop.always\(integer\), which a look-up would run with the rights of")
    await superuser.execute("ALTER FUNCTION shop.always(int) STABLE")
    await add_source(superuser, THROUGH)


POLICIES: LiteralString = (
    "SELECT polrelid::regclass::text FROM pg_policy WHERE polname LIKE 'listener%' ORDER BY polrelid::regclass::text"
)
LEFT: LiteralString = """
    SELECT (SELECT count(*) FROM pg_class WHERE relname LIKE 'lookup\\_%'),
           (SELECT count(*) FROM pg_proc WHERE proname ~ '^(capture|key_of|tenant_of)_[0-9]'),
           (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'listener\\_%'), (SELECT count(*) FROM listener.source)
"""


async def test_the_policy_goes_with_the_last_look_up_that_needs_it(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    assert await rows(superuser, POLICIES) == []
    await add_source(superuser, THROUGH)
    await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    assert await rows(superuser, POLICIES) == [("shop.order_lines",), ("shop.orders",)]
    with pytest.raises(psycopg.Error, match=r"shop\.order_lines is read by discounts"):
        await superuser.execute("SELECT listener.remove_source('shop.order_lines')")
    await superuser.execute("SELECT listener.remove_source('shop.discounts')")
    assert await rows(superuser, POLICIES) == [("shop.orders",)]
    await superuser.execute("SELECT listener.remove_source('shop.order_lines')")
    assert await rows(superuser, POLICIES) == []
    assert await rows(superuser, LEFT) == [(0, 0, 0, 0)]


async def test_uninstalling_takes_look_ups_and_policies_away(shop: Database, superuser: AsyncConnection[Any]) -> None:
    await add_source(superuser, THROUGH)
    await add_source(superuser, "'shop.discounts', through => 'shop.order_lines'")
    await create_view(shop, "off", OFF, [])
    await create_view(shop, "totals", TOTALS, ["product"])
    await superuser.execute("SELECT listener.uninstall()")
    assert await rows(superuser, POLICIES) == []
    assert await rows(superuser, LEFT) == [(0, 0, 0, 0)]


async def test_a_dropped_table_takes_its_look_up_with_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await add_source(superuser, THROUGH)
    await define(superuser, "DROP TABLE shop.order_lines CASCADE")
    await superuser.execute(
        "SELECT listener.remove_source(relid) FROM listener.source WHERE table_name = 'order_lines'"
    )
    assert await rows(superuser, POLICIES) == []
    assert await rows(superuser, LEFT) == [(0, 0, 0, 0)]


async def test_a_shared_table_dirties_all_tenants_of_its_views_and_no_other_view(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(
        superuser,
        "CREATE TABLE shop.rates (product text PRIMARY KEY, rate int); INSERT INTO shop.rates VALUES ('tea', 2);"
        "GRANT SELECT ON shop.rates TO listener_service",
    )
    rated = (
        "SELECT o.tenant_id, r.product, sum(r.rate)::int AS rate FROM shop.orders o JOIN shop.rates r USING (product)"
    )
    await create_view(shop, "rated", rated + " GROUP BY 1, 2", ["product"])
    await create_view(shop, "sales", SALES, ["product"])
    await settle(service)
    await superuser.execute("UPDATE shop.rates SET rate = 3")
    assert await dirtied(service) == {"rated": [""]}
    await is_exact(superuser, service, "rated", "sales")


async def test_a_table_of_two_tenant_columns_keeps_the_views_of_both_exact(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(
        superuser,
        "CREATE TABLE shop.deals (tenant_id uuid, account_id uuid, cents bigint);"
        "GRANT SELECT ON shop.deals TO listener_service",
    )
    await create_view(shop, "sold", "SELECT tenant_id, sum(cents)::bigint FROM shop.deals GROUP BY 1", [])
    await create_view(
        shop,
        "bought",
        "SELECT account_id, sum(cents)::bigint FROM shop.deals GROUP BY 1",
        [],
        tenant_column="account_id",
    )
    await settle(service)
    await superuser.execute("INSERT INTO shop.deals VALUES (%s, %s, 10), (%s, %s, 20)", (ANNA, BERT, BERT, CLEO))
    assert await dirtied(service) == {"sold": [ANNA, BERT], "bought": [BERT, CLEO]}
    await superuser.execute("UPDATE shop.deals SET account_id = %s WHERE tenant_id = %s", (ANNA, ANNA))
    assert await dirtied(service) == {"sold": [ANNA], "bought": [ANNA, BERT]}
    await settle(service)
    assert await differences(superuser, "sold") + await differences(superuser, "bought") == []
