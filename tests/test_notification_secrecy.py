"""What a role hears that may do nothing but connect, where the installation hides names."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import ANNA, BALANCE, SALES, TENANTS, application, create_view, one, open_shop, order, rows, settle

pytestmark = pytest.mark.anyio

SOMETHING = '{"tenant_id": null, "source": "listener"}'
PLAIN_ROLE = """
    DO $$ BEGIN IF to_regrole('shop_stranger') IS NULL THEN CREATE ROLE shop_stranger LOGIN; END IF; END $$
"""


@pytest.fixture
async def shop(database: Database) -> Database:
    """Two views; one of a table by tenant and one whose target another view reads."""
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"])
    await create_view(database, "top", "SELECT tenant_id, max(orders) AS orders FROM sales GROUP BY 1", ["tenant_id"])
    async with database.connect() as superuser:
        await superuser.execute(sql.SQL(PLAIN_ROLE))
    return database


async def hide_names(shop: Database) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.set_notify_names(false)")


async def all_heard(listening: AsyncConnection[Any], superuser: AsyncConnection[Any]) -> list[str]:
    """Payloads until now, as they are: notifications arrive in the order of their commits."""
    await superuser.execute("SELECT pg_notify('listener_changes', 'until here')")
    payloads = []
    async for notification in listening.notifies(timeout=30):
        if notification.payload == "until here":
            break
        payloads.append(notification.payload)
    return payloads


async def write_in_every_way(shop: Database, service: AsyncConnection[Any]) -> None:
    """One tenant, all tenants, several tables in a transaction, a truncation, a refresh that writes a source."""
    async with shop.connect() as superuser, superuser.transaction():
        for tenant in TENANTS:
            await order(superuser, tenant, "tea")
        await superuser.execute("INSERT INTO shop.payments (tenant_id, cents) VALUES (%s, 1)", (ANNA,))
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "pot")
        await app.execute("UPDATE shop.orders SET quantity = 2")
        await app.execute("DELETE FROM shop.payments")
    await settle(service)
    async with shop.connect() as superuser:
        await superuser.execute("TRUNCATE shop.orders")
        await superuser.execute("SELECT listener.mark_all_dirty(v.id) FROM listener.managed_view v")
        await superuser.execute("SELECT listener.ring_for_all()")


async def test_who_listens_hears_neither_tenant_nor_table(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await hide_names(shop)
    async with shop.connect("shop_stranger") as stranger:
        await stranger.execute("LISTEN listener_changes")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await stranger.execute("SELECT * FROM shop.orders")
        await write_in_every_way(shop, service)
        said = await all_heard(stranger, superuser)
    assert len(said) > 5, said
    assert set(said) == {SOMETHING}
    for digest in await rows(superuser, "SELECT capture_digest = listener.capture_digest(id) FROM listener.source"):
        assert digest == (True,), "doctor knows the new functions"


async def test_a_transaction_of_many_tenants_and_tables_rings_once(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await hide_names(shop)
    async with shop.connect("shop_stranger") as stranger:
        await stranger.execute("LISTEN listener_changes")
        async with superuser.transaction():
            for tenant in TENANTS:
                await order(superuser, tenant, "tea")
                await superuser.execute("INSERT INTO shop.payments (tenant_id, cents) VALUES (%s, 1)", (tenant,))
        assert await all_heard(stranger, superuser) == [SOMETHING]


async def test_a_source_that_comes_later_and_names_that_come_back(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await hide_names(shop)
    await superuser.execute(
        "SET ROLE shop_owner; CREATE TABLE shop.later (tenant_id uuid, n int); GRANT SELECT ON shop.later TO"
        " listener_service; RESET ROLE"
    )
    await create_view(shop, "counted", "SELECT tenant_id, sum(n) AS n FROM shop.later GROUP BY 1", ["tenant_id"])
    async with shop.connect("shop_stranger") as stranger:
        await stranger.execute("LISTEN listener_changes")
        await superuser.execute("INSERT INTO shop.later VALUES (%s, 1)", (ANNA,))
        assert await all_heard(stranger, superuser) == [SOMETHING]
        async with shop.connect("listener_migrator") as migrator:
            # The mode is another matter, and leaves the names hidden.
            await migrator.execute("SELECT listener.set_notify('always')")
            await superuser.execute("INSERT INTO shop.later VALUES (%s, 1)", (ANNA,))
            assert await all_heard(stranger, superuser) == [SOMETHING]
            await migrator.execute("SELECT listener.set_notify_names(true)")
        await superuser.execute("INSERT INTO shop.later VALUES (%s, 1)", (ANNA,))
        (said,) = await all_heard(stranger, superuser)
        assert ANNA in said
        assert "shop.later" in said


async def test_the_service_needs_no_names(shop: Database, superuser: AsyncConnection[Any]) -> None:
    await hide_names(shop)
    # The sweep would find the change as well, an hour later.
    async with shop.service(sweep_interval="1h") as running:
        await running.until_refreshed("top", ANNA)
        done = len(running.outcomes)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "tea")
        await running.until_refreshed("top", ANNA, after=done)
        assert running.service.metrics.malformed_notifications._value.get() == 0
    assert await one(superuser, "SELECT orders FROM top WHERE tenant_id = %s", ANNA) == 1


async def test_only_the_owner_says_what_is_told(shop: Database) -> None:
    async with shop.connect("listener_service") as service:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await service.execute("SELECT listener.set_notify_names(true)")
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="true or false") as refused:
            await migrator.execute("SELECT listener.set_notify_names(NULL)")
    assert refused.value.sqlstate == "LSN02"
