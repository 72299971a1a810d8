"""What anybody may send on the channel: it is counted where it is malformed, and worth a look at the log at most."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from psycopg import AsyncConnection

from books import value
from conftest import Database, RunningService, eventually
from on_call import explained, is_exact, pauses_and_resumes
from shop import ANNA, BERT, SALES, application, create_view, order, rows

pytestmark = pytest.mark.anyio

STORM = 20_000
MALFORMED = [
    "no json",
    "",
    "x" * 7999,
    "[1, 2]",
    '"text"',
    "{}",
    '{"source": 1, "tenant_id": null}',
    '{"source": "shop.orders", "tenant_id": []}',
    '{"probe": [1]}',
    "'; DELETE FROM shop.orders; --",
    "[" * 7000,
    '{"a":' * 1500,
]
FORGED = [
    json.dumps({"tenant_id": BERT, "source": "shop.orders"}),
    json.dumps({"tenant_id": "' OR true; --", "source": "shop.orders"}),
    json.dumps({"tenant_id": BERT, "source": "pg_authid; DROP TABLE shop.orders"}),
    json.dumps({"tenant_id": None, "source": "shop.orders"}),
    json.dumps({"probe": "0" * 32}),
]


@pytest.fixture
async def shop(shop: Database) -> Database:
    await create_view(shop, "sales", SALES, ["product"])
    return shop


@asynccontextmanager
async def stranger(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    """A session of a role that nothing was ever granted to."""
    async with shop.connect() as superuser:
        await superuser.execute(
            "DO $$ BEGIN IF to_regrole('stranger') IS NULL THEN CREATE ROLE stranger LOGIN; END IF; END $$"
        )
    async with shop.connect("stranger") as connection:
        yield connection


async def at_rest(shop: Database, running: RunningService) -> None:
    """Everything is shown, and whatever is heard from now on is heard, not polled for."""
    await eventually(lambda: is_exact(shop, "sales"))
    await eventually(lambda: running.service.drainer.doorbell.state == "resting")


def malformed(running: RunningService) -> float:
    return value(running, "listener_malformed_notifications_total")


async def shows_a_change_of_anna_alone(shop: Database, running: RunningService, seen: int) -> None:
    async with application(shop, ANNA) as anna:
        await order(anna, ANNA, "tea")
    await running.until_refreshed("sales", ANNA, after=seen)
    assert {change.key.tenant for change, _ in running.outcomes[seen:]} == {ANNA}
    assert await is_exact(shop, "sales")


async def test_malformed_notifications_are_counted_and_stop_nothing(shop: Database) -> None:
    async with stranger(shop) as anybody, shop.service(sweep_interval=3600.0) as running:
        await at_rest(shop, running)
        for number, payload in enumerate(MALFORMED, start=1):
            seen = len(running.outcomes)
            await anybody.execute("SELECT pg_notify('listener_changes', %s)", (payload,))
            await shows_a_change_of_anna_alone(shop, running, seen)
            assert (payload, malformed(running)) == (payload, number)
        assert value(running, "listener_reconnects_total") == 0


async def test_forged_notifications_refresh_nobody(shop: Database) -> None:
    async with stranger(shop) as anybody, shop.service(sweep_interval=3600.0) as running:
        await at_rest(shop, running)
        for payload in FORGED:
            seen = len(running.outcomes)
            await anybody.execute("SELECT pg_notify('listener_changes', %s)", (payload,))
            await shows_a_change_of_anna_alone(shop, running, seen)
        assert malformed(running) == 0
        assert value(running, "listener_reconnects_total") == 0


async def test_a_storm_of_notifications_costs_looks_and_no_memory(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with stranger(shop) as anybody, shop.service(sweep_interval=3600.0) as running:
        await at_rest(shop, running)
        seen = len(running.outcomes)

        async def storm(size: int) -> int:
            """Bytes in use when all of it was heard; the malformed ones come last."""
            heard = malformed(running)
            for form in ('{"tenant_id": "%s", "source": "shop.orders", "n": %s}', '{"probe": "%s %s"}', "%s %s"):
                await anybody.execute(
                    "SELECT count(pg_notify('listener_changes', format(%s, %s::text, n)))"
                    " FROM generate_series(1, %s) n",
                    (form, BERT, size // 3),
                )
            said = await explained(shop, "sales", ANNA)
            assert said == ["fresh"], said
            await eventually(lambda: malformed(running) == heard + size // 3)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await storm(STORM // 10)
            after = await storm(STORM)
        finally:
            tracemalloc.stop()
        # A byte kept of each notification would be more than that.
        assert after < before + STORM
        assert running.outcomes[seen:] == []
        await pauses_and_resumes(shop, "sales", ANNA)
        await at_rest(shop, running)
        seen = len(running.outcomes)
        await shows_a_change_of_anna_alone(shop, running, seen)
        assert await running.service.reasons_not_ready() == []
        assert value(running, "listener_reconnects_total") == 0
        assert await rows(superuser, "SELECT FROM listener.dead_letter") == []
