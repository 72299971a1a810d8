"""A tenant whose refreshes hang: it has half of the workers, and the others are served by the rest."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg import AsyncConnection, sql

from conftest import Database, RunningService, eventually
from gates import FIRST, GATE, close, open_gate
from listener import view_queries
from shop import ANNA, BERT, CLEO, application, create_view, define, one, open_shop, order

pytestmark = pytest.mark.anyio

QUERY = """
    SELECT tenant_id, count(*) + CASE tenant_id WHEN '11111111-1111-4111-8111-111111111111' THEN shop.gate(7) ELSE 0 END
        AS orders
    FROM shop.orders GROUP BY tenant_id
"""
VIEWS = [f"orders_{number}" for number in range(6)]


@pytest.fixture
async def shop(database: Database) -> Database:
    """Six views whose refresh stops at the first gate, for Anna alone."""
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, GATE)
    for name in VIEWS:
        await create_view(
            database,
            name,
            QUERY,
            [],
            depends_on=[],
        )
    return database


@pytest.mark.parametrize("workers", [2, 4, 5])
async def test_others_are_refreshed_while_more_keys_of_one_tenant_hang_than_there_are_workers(
    shop: Database, workers: int
) -> None:
    async with shop.connect() as holder, shop.service(workers=workers, sweep_interval="200ms") as running:
        await running.until(lambda: view_queries.all_fresh(holder))
        await close(holder, FIRST)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "a")
        debouncer = running.service.debouncer
        await eventually(lambda: hanging(running) == workers // 2)
        # The rest of hers is due as well.
        await eventually(lambda: len(debouncer) == len(VIEWS) - workers // 2)
        for tenant in (BERT, CLEO):
            async with application(shop, tenant) as app:
                await order(app, tenant, "a")
            await until_shown(running, holder, tenant)
        assert hanging(running) == workers // 2
        await open_gate(holder, FIRST)
        await until_shown(running, holder, ANNA)


def hanging(running: RunningService) -> int:
    """How many of Anna's keys are being refreshed."""
    return sum(key.tenant == ANNA for key in running.service.debouncer.running_keys())


async def until_shown(running: RunningService, superuser: AsyncConnection[Any], tenant: str) -> None:
    """Until each view shows the tenant's one order."""

    async def is_shown() -> bool:
        for name in VIEWS:
            shown = sql.SQL("SELECT orders FROM {} WHERE tenant_id = %s").format(sql.Identifier(name))
            if await one(superuser, shown, tenant) != 1:
                return False
        return True

    await running.until(is_shown)
