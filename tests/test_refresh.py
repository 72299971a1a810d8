"""Refresh: one tenant's rows become what the definition says, in one transaction, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection, sql

from conftest import DEADLINE, Database
from listener import changes
from listener.refresh import Outcome, refresh
from shop import (
    ANNA,
    BERT,
    CLEO,
    SALES,
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

REFRESH = "SELECT outcome FROM listener.refresh('sales', %s::text)"
COUNTS = "SELECT outcome, inserted, updated, deleted FROM listener.refresh('sales', %s::text)"
# Where each row version lies, who wrote it and who touched it.
VERSIONS = "SELECT ctid, xmin, xmax, s.*::text FROM public.sales s WHERE (tenant_id, product) <> (%s, %s) ORDER BY 4"


@pytest.fixture
async def shop(shop: Database) -> Database:
    await create_view(shop, "sales", SALES, ["product"])
    async with shop.connect() as superuser, shop.connect("listener_service") as service:
        for tenant in (ANNA, BERT):
            for product in ("apple", "bread", "cheese"):
                await order(superuser, tenant, product)
        await settle(service)
    return shop


async def test_only_what_differs_is_written(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    before = await rows(superuser, VERSIONS, ANNA, "bread")
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "bread", 5)
        assert await rows(service, COUNTS, ANNA) == [("refreshed", 0, 1, 0)]
        assert await rows(superuser, VERSIONS, ANNA, "bread") == before
        await app.execute("DELETE FROM shop.orders WHERE product = 'bread'")
        assert await rows(service, COUNTS, ANNA) == [("refreshed", 0, 0, 1)]
        assert await rows(superuser, VERSIONS, ANNA, "bread") == before
        await order(app, ANNA, "bread")
        assert await rows(service, COUNTS, ANNA) == [("refreshed", 1, 0, 0)]
        assert await rows(superuser, VERSIONS, ANNA, "bread") == before
    assert await rows(service, COUNTS, ANNA) == [("refreshed", 0, 0, 0)]


async def test_another_tenants_change_is_not_seen_even_where_it_is_due(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await order(superuser, BERT, "apple", 100)
    assert await rows(service, COUNTS, ANNA) == [("refreshed", 0, 0, 0)]
    assert await rows(service, COUNTS, BERT) == [("refreshed", 0, 1, 0)]


async def test_a_definition_that_forgets_the_tenant_still_sees_one_tenants_rows(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(
        shop, "everything", "SELECT t.id AS tenant_id, (SELECT count(*) FROM shop.orders) AS n FROM shop.tenants t", []
    )
    await order(superuser, ANNA, "dates")
    await settle(service)
    assert await rows(superuser, "SELECT tenant_id::text, n FROM public.everything ORDER BY 1") == [
        (ANNA, 4),
        (BERT, 3),
        (CLEO, 0),
    ]


SETTINGS = """SELECT current_setting('app.current_tenant_id', true), current_setting('app.execution_context', true),
                     current_setting('TimeZone'), current_setting('search_path'), current_setting('DateStyle')"""


@pytest.mark.parametrize("call", ["refresh", "compare"])
async def test_the_settings_of_a_refresh_survive_it_neither_on_the_connection_nor_in_the_transaction(
    shop: Database, call: str
) -> None:
    called = sql.SQL("SELECT listener.{}('sales', {}::text)").format(sql.Identifier(call), sql.Literal(ANNA))
    async with shop.connect("listener_service") as fresh:
        before = await rows(fresh, SETTINGS)
        await fresh.execute(called)
        after = await rows(fresh, SETTINGS)
        assert [tuple(value or None for value in row) for row in after] == before
    async with shop.connect("listener_service", autocommit=False) as caller:
        await caller.execute("SET app.current_tenant_id = 'mine'; SET app.execution_context = 'request'")
        await caller.execute("SET TimeZone = 'Asia/Tokyo'; SET search_path = shop; SET DateStyle = 'German'")
        await caller.commit()
        mine = await rows(caller, SETTINGS)
        await caller.execute(called)
        assert await rows(caller, SETTINGS) == mine
        await caller.commit()
        assert await rows(caller, SETTINGS) == mine
        await caller.execute("SET LOCAL app.current_tenant_id = 'local'")
        await caller.execute(called)
        assert (await rows(caller, SETTINGS))[0][0] == "local"
        with pytest.raises(psycopg.Error):
            async with caller.transaction():
                await caller.execute(sql.SQL("SELECT listener.refresh('nothing', 'x'::text)"))
        assert (await rows(caller, SETTINGS))[0][0] == "local"
        await caller.rollback()
        assert await rows(caller, SETTINGS) == mine


async def test_two_refreshers_of_one_key_take_turns(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_service", autocommit=False) as other:
        assert await one(other, REFRESH, ANNA) == "refreshed"
        await order(superuser, ANNA, "apple", 10)
        await service.execute("SET lock_timeout = '1ms'")
        await service.execute("SELECT listener.drain()")
        assert await rows(service, COUNTS, ANNA) == [("busy", None, None, None)]
        await other.commit()
    assert await rows(service, COUNTS, ANNA) == [("refreshed", 0, 1, 0)]
    assert await differences(superuser, "sales") == []


async def test_two_rows_with_one_key_are_an_error_that_names_it_and_nothing_is_written(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await create_view(shop, "doubles", "SELECT tenant_id, product, quantity FROM shop.orders", ["product"])
    await settle(service)
    await order(superuser, ANNA, "bread", 2)
    await order(superuser, ANNA, "dates", 2)
    with pytest.raises(psycopg.Error, match=r"two rows with one key.*bread") as raised:
        await service.execute("SELECT listener.refresh('doubles', %s::text)", (ANNA,))
    assert raised.value.sqlstate == "LSN04"
    assert "tenant_id, product" in str(raised.value.diag.message_hint)
    assert await rows(superuser, "SELECT product FROM public.doubles WHERE tenant_id = %s ORDER BY 1", ANNA) == [
        ("apple",),
        ("bread",),
        ("cheese",),
    ]


async def test_a_key_column_may_be_null(superuser: AsyncConnection[Any], service: AsyncConnection[Any]) -> None:
    for change, counts in (
        ("INSERT INTO shop.orders (tenant_id, quantity) VALUES (%s, 1)", (1, 0, 0)),
        ("UPDATE shop.orders SET quantity = 2 WHERE product IS NULL AND tenant_id = %s", (0, 1, 0)),
        ("DELETE FROM shop.orders WHERE product IS NULL AND tenant_id = %s", (0, 0, 1)),
    ):
        await superuser.execute(change, (ANNA,))
        assert await rows(service, COUNTS, ANNA) == [("refreshed", *counts)]
        assert await differences(superuser, "sales") == []


@pytest.mark.parametrize(
    "level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE], ids=lambda level: level.name
)
async def test_a_refresh_needs_read_committed(shop: Database, level: psycopg.IsolationLevel) -> None:
    async with shop.connect("listener_service", autocommit=False) as service:
        await service.set_isolation_level(level)
        with pytest.raises(psycopg.Error, match="READ COMMITTED") as raised:
            await one(service, REFRESH, ANNA)
        assert raised.value.sqlstate == "LSN05"


async def test_a_reader_never_sees_a_total_that_the_source_never_had(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    totals: set[int] = set()
    rounds: list[int] = []
    reads = 0
    done = False

    async def read() -> None:
        nonlocal reads
        async with shop.connect("listener_service") as reader:
            while not done:
                totals.add(await one(reader, "SELECT sum(quantity) FROM public.sales WHERE tenant_id = %s", ANNA))
                reads += 1

    async with anyio.create_task_group() as tasks, application(shop, ANNA) as app:
        with anyio.fail_after(DEADLINE):
            tasks.start_soon(read)
            while len(rounds) < 100 or reads < 100:
                rounds.append(reads)
                # Everything moves between products: rows appear, change and vanish, and the total stays.
                await app.execute("UPDATE shop.orders SET product = %s", (chance.choice("abcdef"),))
                await app.execute(
                    "UPDATE shop.orders SET product = %s WHERE id %% 2 = %s",
                    (chance.choice("abcdef"), chance.randrange(2)),
                )
                assert await one(service, REFRESH, ANNA) == "refreshed"
            done = True
    assert totals == {3}
    assert await differences(superuser, "sales") == []


async def test_a_tenant_may_be_passed_in_its_own_type(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(
        superuser,
        """CREATE TABLE shop.counters (tenant_id bigint, n int); INSERT INTO shop.counters VALUES (42, 1);
           GRANT SELECT ON shop.counters TO listener_service""",
    )
    await create_view(shop, "counted", "SELECT * FROM shop.counters", ["n"], tenants_query=None)
    calls = [
        f"listener.refresh('sales', '{ANNA.upper()}'::uuid)",
        f"listener.refresh('public.sales', '{ANNA.upper()}'::text)",
        f"listener.refresh('sales', '{ANNA}')",
        "listener.refresh('counted', 42::bigint)",
        "listener.refresh('counted', 42)",
        "listener.refresh('counted', '042'::text)",
        f"listener.refresh_materialized_view_for_tenant('{ANNA}'::uuid, 'sales')",
        f"listener.refresh_materialized_view_for_tenant('{ANNA}'::text, 'sales')",
        "listener.refresh_materialized_view_for_tenant(42::bigint, 'counted')",
    ]
    for call in calls:
        answer = await one(service, sql.SQL("SELECT {}::text").format(sql.SQL(call)))
        assert "refreshed" in answer, call
    keys = await rows(superuser, "SELECT DISTINCT tenant FROM listener.refresh_state WHERE tenant <> '' ORDER BY 1")
    assert keys == [(ANNA,), (BERT,), (CLEO,), ("42",)]


@pytest.mark.parametrize("tenant", [None, "", "no uuid", "x" * 2000])
async def test_a_tenant_that_is_none_is_refused(service: AsyncConnection[Any], tenant: str | None) -> None:
    with pytest.raises(psycopg.Error, match="validation_error") as raised:
        await one(service, REFRESH, tenant)
    assert raised.value.sqlstate == "LSN02"


async def test_whoever_may_call_it_computes_what_the_service_would(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """GRANT USAGE ON SCHEMA listener TO shop_app;
           GRANT EXECUTE ON FUNCTION listener.refresh(text, text) TO shop_app"""
    )
    async with application(shop, BERT) as app:
        await order(superuser, ANNA, "dates", 9)
        assert await rows(app, COUNTS, ANNA) == [("refreshed", 1, 0, 0)]
        assert await one(app, "SELECT current_setting('app.current_tenant_id')") == BERT
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await app.execute("SELECT * FROM public.sales")
    assert await differences(superuser, "sales") == []


async def test_what_another_replica_has_shown_is_left_as_it_is_unless_it_is_newer_or_failed_since(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "bread")
    (change,) = (await changes.drain(service, 0)).keys
    assert (await refresh(service, change)).outcome == "refreshed"
    state = "SELECT xmin, r.*::text FROM listener.refresh_state r ORDER BY 2"
    before = await rows(superuser, state)
    assert await refresh(service, change) == Outcome("fresh", version=change.version)
    assert await rows(superuser, state) == before
    assert (await refresh(service, replace(change, version=change.version + 1))).outcome == "refreshed"
    assert (await refresh(service, replace(change, aged=True))).outcome == "refreshed"
    await superuser.execute("UPDATE listener.refresh_state SET failures = 1")
    assert (await refresh(service, change)).outcome == "refreshed"
    failing = "SELECT tenant_id FROM listener.freshness WHERE status = 'failing'"
    assert (BERT,) in await rows(superuser, failing)
    assert (ANNA,) not in await rows(superuser, failing)
