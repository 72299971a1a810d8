"""A managed view after create_view: dropped, paused, resumed, uninstalled, and changed behind its back."""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import (
    ANNA,
    BALANCE,
    BERT,
    SALES,
    TENANTS,
    TRACES,
    application,
    create_view,
    define,
    differences,
    one,
    order,
    rows,
    settle,
)

pytestmark = pytest.mark.anyio


async def test_dropping_a_view_takes_the_triggers_that_no_other_view_needs(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    before = await rows(superuser, TRACES)
    await create_view(shop, "sales", SALES, ["product"])
    await create_view(shop, "balance", BALANCE, ["product"])
    triggers = "SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE 'listener%' ORDER BY 1"
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.drop_view('balance', keep_target => true)")
        assert await rows(superuser, triggers) == [("shop.orders",)]
        assert await one(superuser, "SELECT count(*) FROM balance") == 0
        await migrator.execute("SELECT listener.drop_view('sales'); DROP TABLE balance")
    assert await rows(superuser, triggers) == []
    await superuser.execute("TRUNCATE listener.change_log")
    assert await rows(superuser, TRACES) == before


async def test_a_paused_view_is_not_refreshed_and_nothing_of_it_is_lost(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    await settle(service)
    async with shop.connect("listener_migrator") as migrator, application(shop, ANNA) as app:
        await migrator.execute("SELECT listener.pause('sales')")
        await order(app, ANNA, "a")
        assert await settle(service) == 0
        assert await one(service, "SELECT outcome FROM listener.refresh('sales', %s::text)", ANNA) == "paused"
        assert await one(superuser, "SELECT count(*) FROM sales") == 0
        await migrator.execute("SELECT listener.resume('sales')")
        assert await settle(service) == 1
    assert await differences(superuser, "sales") == []


async def test_resuming_capture_marks_every_tenant(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    await settle(service)
    enabled = "SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE tgname LIKE 'listener%'"
    async with shop.connect("listener_migrator") as migrator, application(shop, ANNA) as app:
        await migrator.execute("SELECT listener.pause(capture => true)")
        assert await rows(superuser, enabled) == [("D",)]
        await order(app, ANNA, "unseen")
        await migrator.execute("SELECT listener.resume()")
        assert await rows(superuser, enabled) == [("A",)]
        with pytest.raises(psycopg.Error, match="for all views only"):
            await migrator.execute("SELECT listener.pause('sales', capture => true)")
    assert await settle(service) == len(TENANTS)
    assert await differences(superuser, "sales") == []


@pytest.mark.parametrize("targets", ["dropped", "kept"])
async def test_uninstall_leaves_the_application_as_it_was(
    shop: Database, superuser: AsyncConnection[Any], targets: str
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    await superuser.execute("SELECT listener.add_source('shop.payments', 'tenant_id')")
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.uninstall(%s)", (targets == "dropped",))
    assert await rows(superuser, "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'listener%'") == []
    assert (await one(superuser, "SELECT to_regclass('sales')") is None) is (targets == "dropped")
    await order(superuser, ANNA, "a")


@pytest.mark.parametrize(
    "replacement",
    [
        """CREATE OR REPLACE VIEW shop.busy_orders WITH (security_invoker = true) AS
           SELECT o.* FROM shop.orders o LEFT JOIN shop.spots s USING (tenant_id) WHERE quantity > 0""",
        """CREATE OR REPLACE FUNCTION shop.price_of(text) RETURNS bigint LANGUAGE sql STABLE
           AS 'SELECT count(*) FROM shop.spots'""",
    ],
    ids=["view", "function"],
)
async def test_a_nested_view_or_function_that_reads_another_table_is_noticed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], replacement: LiteralString
) -> None:
    query = "SELECT tenant_id, id, shop.price_of(product) AS cents FROM shop.busy_orders"
    await create_view(shop, "nested", query, ["id"], depends_on="{shop.prices}")
    await settle(service)
    assert await rows(service, "SELECT view FROM listener.changed_definitions()") == []
    await define(superuser, replacement)
    assert await rows(service, "SELECT view FROM listener.changed_definitions()") == [("nested",)]
    assert await rows(service, "SELECT view FROM listener.changed_definitions()") == []
    assert await settle(service) == len(TENANTS)
    if "VIEW" in replacement:
        await superuser.execute("INSERT INTO shop.spots VALUES (%s, '(1,1)')", (BERT,))
        assert await rows(service, "SELECT tenant FROM listener.drain()") == [(BERT,)]
