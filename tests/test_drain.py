"""Drain: every committed change becomes dirty keys, whatever the order of the commits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from listener import changes
from shop import (
    ANNA,
    BALANCE,
    BERT,
    CLEO,
    SALES,
    application,
    create_view,
    differences,
    one,
    open_shop,
    order,
    rows,
    settle,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(database: Database) -> Database:
    """Two views, settled."""
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"])
    async with database.connect("listener_service") as service:
        await settle(service)
    return database


@pytest.fixture
async def service(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with shop.connect("listener_service") as connection:
        yield connection


async def drain(connection: AsyncConnection[Any]) -> set[tuple[str, str]] | str:
    """The keys that a drain found, or its other answer."""
    found = await rows(connection, "SELECT outcome, view_name, tenant FROM listener.drain()")
    if found[0][0] != "drained":
        return str(found[0][0])
    return {(view, tenant) for _, view, tenant in found}


def both(*tenants: str) -> set[tuple[str, str]]:
    return {(view, tenant) for view in ("sales", "balance") for tenant in tenants}


async def test_a_change_dirties_the_views_that_read_its_table_and_no_other(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA) as app:
        await app.execute("INSERT INTO shop.payments (tenant_id, cents) VALUES (%s, 1)", (ANNA,))
        assert await drain(service) == {("balance", ANNA)}
        await order(app, ANNA, "a")
        assert await drain(service) == both(ANNA)


async def test_a_drain_with_nothing_new_writes_nothing(shop: Database, service: AsyncConnection[Any]) -> None:
    state = "SELECT count(*), max(id) FROM listener.drain_log"
    before = await rows(service, state)
    async with service.transaction():
        assert await drain(service) == "nothing"
        assert await one(service, "SELECT pg_current_xact_id_if_assigned()::text") is None
    assert await rows(service, state) == before


async def test_busy_is_an_answer_of_its_own(shop: Database, service: AsyncConnection[Any]) -> None:
    async with shop.connect("listener_service", autocommit=False) as other, application(shop, ANNA) as app:
        await drain(other)
        await order(app, ANNA, "a")
        assert await drain(service) == "busy"
        await other.commit()
        assert await drain(service) == both(ANNA)


async def test_a_drain_that_rolled_back_lost_nothing(shop: Database, service: AsyncConnection[Any]) -> None:
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a")
    async with service.transaction(force_rollback=True):
        assert await drain(service) == both(ANNA)
    assert await drain(service) == both(ANNA)


async def test_a_writer_that_commits_late_is_found(shop: Database, service: AsyncConnection[Any]) -> None:
    async with application(shop, ANNA, autocommit=False) as late, application(shop, BERT) as early:
        await order(late, ANNA, "a")
        await order(early, BERT, "a")
        assert await drain(service) == both(BERT)
        # A later drain must carry the open transaction on.
        await order(early, BERT, "b")
        assert await drain(service) == both(BERT)
        await late.commit()
        assert await drain(service) == both(ANNA)
        assert await drain(service) == "nothing"


async def test_a_late_writer_inside_a_savepoint_is_found(shop: Database, service: AsyncConnection[Any]) -> None:
    async with application(shop, ANNA, autocommit=False) as late, application(shop, BERT) as early:
        async with late.transaction(), late.transaction():
            await order(late, ANNA, "a")
            await order(early, BERT, "a")
            assert await drain(service) == both(BERT)
        await late.commit()
        assert await drain(service) == both(ANNA)


async def test_a_late_writer_survives_the_purge(shop: Database, service: AsyncConnection[Any]) -> None:
    async with application(shop, ANNA, autocommit=False) as late, application(shop, BERT) as early:
        await order(late, ANNA, "a")
        await order(early, BERT, "a")
        await drain(service)
        await late.commit()
        await service.execute("SELECT listener.purge()")
        assert await drain(service) == both(ANNA)
        await order(early, BERT, "b")
        await drain(service)
        await service.execute("SELECT listener.purge()")
    async with shop.connect() as superuser:
        kept = await rows(superuser, "SELECT tenant FROM listener.change_log ORDER BY tenant")
    assert (ANNA,) not in kept, "consumed rows go"


async def test_a_transaction_that_drains_and_then_writes_loses_nothing(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    async with shop.connect() as superuser:
        await superuser.execute(
            "GRANT USAGE ON SCHEMA listener TO shop_app; GRANT EXECUTE ON FUNCTION listener.drain() TO shop_app"
        )
    async with application(shop, ANNA, autocommit=False) as app, application(shop, BERT) as other:
        await order(app, ANNA, "before")
        # A later transaction that ends first: now the snapshot's xmax is past the drain's own id.
        await order(other, BERT, "a")
        assert await drain(app) == both(ANNA, BERT)
        await order(app, ANNA, "after")
        await app.commit()
        assert await drain(service) == both(ANNA)
        await settle(service)
    assert await one(service, "SELECT count(*) FROM public.sales WHERE product = 'after'") == 1


async def test_an_open_transaction_that_refreshed_a_key_stops_neither_drain_nor_other_keys(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    refresh = "SELECT outcome FROM listener.refresh('sales', %s::text)"
    async with shop.connect("listener_service", autocommit=False) as other, application(shop, ANNA) as app:
        await order(app, ANNA, "a")
        await drain(service)
        assert await one(other, refresh, ANNA) == "refreshed"
        await service.execute("SET lock_timeout = '1ms'")
        await order(app, ANNA, "b")
        assert await drain(service) == both(ANNA)
        assert await one(service, refresh, BERT) == "refreshed"
        assert await one(service, refresh, ANNA) == "busy"
        await other.commit()
        stale = "SELECT listener.is_stale(id, %s) FROM listener.managed_view WHERE name = 'sales'"
        assert await one(service, stale, ANNA) is True, "b was drained after the refresh had read its version"
        assert await one(service, refresh, ANNA) == "refreshed"
        assert await one(service, stale, ANNA) is False


async def test_a_restored_copy_takes_nothing_for_known(shop: Database) -> None:
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "unconsumed")
    copy = Database(shop.server, shop.server.clone(shop.name))
    try:
        async with copy.connect("listener_service") as service, copy.connect() as superuser:
            found = await drain(service)
            assert isinstance(found, set)
            assert found >= both("", ANNA)
            assert await settle(service) >= 6
            assert await differences(superuser, "sales") == []
            assert await drain(service) == "nothing"
            async with application(copy, BERT) as app:
                await order(app, BERT, "in the copy")
            assert await drain(service) == both(BERT)
    finally:
        shop.server.drop(copy.name)


@pytest.mark.parametrize("column", ["snapshot", "system_identifier"])
async def test_a_cursor_of_the_future_or_of_another_cluster_means_nothing(
    shop: Database, service: AsyncConnection[Any], column: str
) -> None:
    future = "18446744073709000000:18446744073709000000:" if column == "snapshot" else None
    async with shop.connect() as superuser, application(shop, CLEO) as app:
        await order(app, CLEO, "a")
        await superuser.execute(
            """INSERT INTO listener.drain_log (id, drained_at, snapshot, xid, changes, keys, correlation_id,
                                               system_identifier, database_oid)
               SELECT id + 1, drained_at, coalesce(%s::pg_snapshot, snapshot), xid, 0, 0, 'x',
                      system_identifier + %s, database_oid
               FROM listener.drain_log ORDER BY id DESC LIMIT 1""",
            (future, int(column == "system_identifier")),
        )
        found = await drain(service)
        assert isinstance(found, set)
        assert found >= both("", CLEO)
        assert await drain(service) == "nothing"
        await order(app, CLEO, "b")
        assert await drain(service) == both(CLEO)


@pytest.mark.parametrize(
    "level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE], ids=lambda level: level.name
)
async def test_a_drain_needs_read_committed(shop: Database, level: psycopg.IsolationLevel) -> None:
    async with shop.connect("listener_service", autocommit=False) as service:
        await service.set_isolation_level(level)
        with pytest.raises(psycopg.Error, match=r"listener\.drain\(\) needs a READ COMMITTED") as raised:
            await drain(service)
        assert raised.value.sqlstate == "LSN05"


async def test_each_drain_that_finds_a_change_raises_the_version_once(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    version = "SELECT version FROM listener.freshness WHERE view_name = 'sales' AND tenant_id = %s"
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a")
        await drain(service)
        first = await one(service, version, ANNA)
        await order(app, ANNA, "b")
        await order(app, ANNA, "c")
        await drain(service)
    assert await one(service, version, ANNA) == first + 1


async def test_dirty_since_is_the_oldest_change_that_is_not_refreshed(
    shop: Database, service: AsyncConnection[Any]
) -> None:
    since = "SELECT dirty_since FROM listener.freshness WHERE view_name = 'sales' AND tenant_id = %s"
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a")
        await drain(service)
        first = await one(service, since, ANNA)
        await order(app, ANNA, "b")
        await drain(service)
        assert await one(service, since, ANNA) == first
        await settle(service)
        assert await one(service, since, ANNA) is None
        await order(app, ANNA, "c")
        await drain(service)
        assert await one(service, since, ANNA) > first


@pytest.mark.parametrize("tenants", [3, 3000])
async def test_few_keys_are_in_the_answer_and_very_many_are_read_after_the_commit(
    shop: Database, service: AsyncConnection[Any], tenants: int
) -> None:
    async with shop.connect() as superuser:
        await superuser.execute(
            "INSERT INTO shop.orders (tenant_id, product) SELECT lpad(n::text, 32, '0')::uuid, 'a'"
            " FROM generate_series(1, %s) n",
            (tenants,),
        )
    async with service.transaction(force_rollback=True):
        answer = await rows(service, "SELECT keys, tenant, length(d::text) FROM listener.drain() d")
        assert {keys for keys, _, _ in answer} == {2 * tenants}
        assert (len(answer) == 2 * tenants) is (tenants == 3)
        assert sum(length for _, _, length in answer) < 100_000
    drained = await changes.drain(service, now=1000.0)
    assert service.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert len({change.key for change in drained.keys}) == len(drained.keys) == 2 * tenants
    assert {change.correlation_id for change in drained.keys} == {drained.correlation_id}
    assert {change.version for change in drained.keys} == {await one(service, "SELECT max(id) FROM listener.drain_log")}
    assert all(900 < change.first_change <= 1000 for change in drained.keys)
    assert (await changes.drain(service, now=1001.0)).outcome == "nothing"
