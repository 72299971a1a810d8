"""Filling: by tenant, resumable after a kill, shared with whoever runs, throttled, and told in SQL."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import psycopg
import pytest

from command import ROOT, environment, listener
from conftest import Database, eventually
from listener.dead_letters import RetryPolicy
from listener.fill import Progress, fill
from shop import ANNA, SALES, create_view, differences, one, order, rows, settle

pytestmark = pytest.mark.anyio

TENANTS = 40
POLICY = RetryPolicy(5, timedelta(seconds=1), timedelta(seconds=1), timedelta(seconds=1))
FILLING = "SELECT total, done, remaining, failing FROM listener.filling WHERE view_name = 'sales'"


@pytest.fixture
async def shop(shop: Database) -> Database:
    """Orders of many tenants, under policies that raise where no tenant is set; a view that is not filled."""
    async with shop.connect() as superuser:
        await superuser.execute("TRUNCATE shop.tenants")
        await superuser.execute(
            "INSERT INTO shop.tenants"
            " SELECT ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid FROM generate_series(1, %s) n",
            (TENANTS,),
        )
        await superuser.execute(
            "INSERT INTO shop.orders (tenant_id, product)"
            " SELECT t.id, p FROM shop.tenants t, unnest('{tea,pot}'::text[]) p"
        )
    await create_view(shop, "sales", SALES, ["product"])
    return shop


def connecting(shop: Database) -> Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]:
    return partial(shop.connect, "listener_service")


async def filled(shop: Database, **options: Any) -> list[Progress]:
    """Every step of a filling, to its end."""
    async with aclosing(fill(connecting(shop), "sales", policy=POLICY, **options)) as steps:
        return [step async for step in steps]


async def expanded(service: psycopg.AsyncConnection[Any]) -> None:
    """Marked, written out and drained; no key is refreshed."""
    for statement in ("listener.drain()", "listener.expand('sales')", "listener.drain()"):
        await service.execute(f"SELECT {statement}".encode())


async def test_a_view_is_filled_without_the_service_and_its_progress_can_be_read_in_sql(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    assert await rows(service, FILLING) == [(None, None, 0, 0)], "nobody knows how many tenants there are yet"
    assert "sales: all tenants are marked, and not written out yet\n" in listener("status", url=shop.url()).stdout
    await service.execute("SELECT listener.drain()")
    assert await rows(service, FILLING) == [(None, None, 0, 0)]
    await service.execute("SELECT listener.expand('sales')")
    assert await rows(service, FILLING) == [(TENANTS, 0, TENANTS, 0)]
    await service.execute("SELECT listener.drain()")
    tenant = await one(superuser, "SELECT id::text FROM shop.tenants LIMIT 1")
    await service.execute("SELECT listener.refresh('sales', %s::text)", (tenant,))
    assert await rows(service, FILLING) == [(TENANTS, 1, TENANTS - 1, 0)]
    (more,) = await rows(
        service, "SELECT since < clock_timestamp(), rate > 0, time_left > '0', paused FROM listener.filling"
    )
    assert more == (True, True, True, False)

    status = listener("status", url=shop.url()).stdout.splitlines()
    assert status[2].startswith(f"sales: 1 of {TENANTS} keys are filled, ")
    assert status[2].endswith(" keys a second")

    done = listener("fill", "sales", "--workers", "3", "--json", url=shop.url())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["view"], told["done"], told["failed"], told["remaining"]) == ("sales", TENANTS - 1, 0, 0)
    assert told["rows_changed"] == 2 * (TENANTS - 1)
    assert await differences(superuser, "sales") == []
    # A tenant's own write is no filling.
    await order(superuser, tenant, "tea")
    await service.execute("SELECT listener.drain()")
    assert await rows(service, "SELECT * FROM listener.filling") == []
    await settle(service)
    again = listener("fill", "public.sales", url=shop.url())
    assert (again.returncode, again.stdout) == (0, "sales: 0 keys filled, 0 rows changed\n")


async def test_a_filling_that_was_killed_goes_on_where_it_was(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "listener", "fill", "sales", "--max-rate", "20",
        env=environment(LISTENER_DATABASE_URL=shop.url()), stderr=PIPE, stdout=PIPE, cwd=ROOT,
    )  # fmt: skip
    shown = "SELECT tenant, refreshed_at FROM listener.refresh_state WHERE tenant <> ''"

    async def some() -> bool:
        return len(await rows(superuser, shown)) >= 3

    await eventually(some)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    before = dict(await rows(superuser, shown))
    assert 3 <= len(before) < TENANTS
    steps = await filled(shop)
    assert steps[-1].done == TENANTS - len(before)
    after = dict(await rows(superuser, shown))
    assert len(after) == TENANTS
    assert {tenant: after[tenant] for tenant in before} == before, "what was done is not done again"
    assert await differences(superuser, "sales") == []


async def test_two_fillings_and_a_service_share_the_keys_and_no_change_of_another_view_is_lost(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    await create_view(
        shop, "payments_of", "SELECT tenant_id, sum(cents) AS cents FROM shop.payments GROUP BY 1", ["tenant_id"]
    )
    tenant = await one(superuser, "SELECT id::text FROM shop.tenants LIMIT 1")
    async with shop.service() as running:
        # Where none listens a filling drains by itself, and what it drains of other views is the sweep's to find.
        await eventually(lambda: running.service.listening.connected)
        async with anyio.create_task_group() as both:
            for _ in range(2):
                both.start_soon(partial(filled, shop, workers=2))
            await superuser.execute("INSERT INTO shop.payments (tenant_id, cents) VALUES (%s, 5)", (tenant,))

        async def exact() -> bool:
            return not await differences(superuser, "payments_of") and not await differences(superuser, "sales")

        await running.until(exact)
        assert running.service.metrics.sweep_recovered._value.get() == 0
    assert await one(superuser, "SELECT count(*) FROM listener.dirty WHERE tenant <> ''") is not None


async def test_where_a_service_listens_what_is_logged_is_left_to_its_drain(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await settle(service)
    await create_view(
        shop, "payments_of", "SELECT tenant_id, sum(cents) AS cents FROM shop.payments GROUP BY 1", ["tenant_id"]
    )
    await superuser.execute("SELECT listener.mark_all_dirty(id) FROM listener.managed_view WHERE name = 'sales'")
    async with await psycopg.AsyncConnection.connect(
        shop.url(), autocommit=True, application_name="listener listen"
    ) as listening:
        await listening.execute("LISTEN listener_changes")

        async def serve(seen: set[tuple[str, str]]) -> None:
            async for _ in listening.notifies():
                # Whoever did not wait for it has drained by now.
                await anyio.sleep(0.3)
                seen |= set(await rows(service, "SELECT view_name, tenant FROM listener.drain()"))

        seen: set[tuple[str, str]] = set()
        async with anyio.create_task_group() as serving:
            serving.start_soon(serve, seen)
            await filled(shop)
            serving.cancel_scope.cancel()
    assert ("payments_of", "") in seen
    assert ("sales", "") in seen


async def test_a_key_that_somebody_is_at_is_left_to_him_and_waited_for(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await expanded(service)
    tenant = await one(superuser, "SELECT max(id::text) FROM shop.tenants")
    async with shop.connect("listener_service", autocommit=False) as other:
        await other.execute("SELECT listener.refresh('sales', %s::text)", (tenant,))
        async with aclosing(fill(connecting(shop), "sales", policy=POLICY)) as steps:
            async for step in steps:
                if step.done == TENANTS - 1:
                    break
            assert step.remaining == 1
            await other.commit()
            step = [step async for step in steps][-1]
    assert (step.done, step.remaining, step.failed) == (TENANTS, 0, 0)
    assert await differences(superuser, "sales") == []


async def test_a_key_that_fails_is_recorded_and_stops_no_other(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute(
        "SET ROLE listener_owner; SELECT listener.drop_view('sales'); RESET ROLE;"
        " ALTER TABLE shop.orders ADD zero int DEFAULT 1"
    )
    await create_view(shop, "sales", "SELECT tenant_id, sum(1 / zero) AS n FROM shop.orders GROUP BY 1", ["tenant_id"])
    poisoned = await one(superuser, "SELECT min(id::text) FROM shop.tenants")
    await superuser.execute("UPDATE shop.orders SET zero = 0 WHERE tenant_id = %s", (poisoned,))
    done = listener("fill", "sales", "--json", url=shop.url())
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["done"], told["failed"]) == (TENANTS - 1, 1)
    assert told["errors"][0]["tenant_id"] == poisoned
    assert done.stderr == f"listener: sales of tenant {poisoned}: division by zero\n"
    assert await rows(superuser, "SELECT tenant, failures FROM listener.refresh_state WHERE failures > 0") == [
        (poisoned, 1)
    ]
    assert await rows(service, FILLING) == [(TENANTS, TENANTS - 1, 1, 1)]


async def test_no_more_keys_begin_than_the_rate_allows(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await expanded(service)
    await filled(shop, workers=4, max_rate=40)
    took = await one(
        superuser,
        "SELECT extract(epoch FROM max(started_at) - min(started_at)) FROM listener.refresh_state WHERE tenant <> ''",
    )
    # It may well take longer; that it does not take less is what the rate promises.
    assert took >= 0.9 * (TENANTS - 1) / 40


async def test_tenants_that_come_and_go_while_a_view_is_filled(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    gone = await rows(superuser, "SELECT id::text FROM shop.tenants ORDER BY id LIMIT 5")
    async with aclosing(fill(connecting(shop), "sales", policy=POLICY, max_rate=20)) as steps:
        async for step in steps:
            if step.done < 5:
                continue
            for (tenant,) in gone:
                await superuser.execute("DELETE FROM shop.orders WHERE tenant_id = %s", (tenant,))
                await superuser.execute("DELETE FROM shop.tenants WHERE id = %s", (tenant,))
            await superuser.execute("INSERT INTO shop.tenants VALUES (%s)", (ANNA,))
            await order(superuser, ANNA, "tea")
            break
        assert [step async for step in steps][-1].remaining == 0
    await settle(service)
    assert await differences(superuser, "sales") == []
    assert await one(superuser, "SELECT count(DISTINCT tenant_id) FROM sales") == TENANTS - 5 + 1


async def test_a_view_without_tenants_is_one_key(shop: Database, superuser: psycopg.AsyncConnection[Any]) -> None:
    await create_view(
        shop, "everybody", "SELECT count(*) AS n FROM shop.tenants", ["n"], tenant_column=None, tenants_query=None
    )
    done = listener("fill", "everybody", url=shop.url())
    assert (done.returncode, done.stdout.partition(",")[0]) == (0, "everybody: 1 key filled")
    assert await rows(superuser, "SELECT n FROM everybody") == [(TENANTS,)]


async def test_what_cannot_be_filled_is_one_line(shop: Database, superuser: psycopg.AsyncConnection[Any]) -> None:
    await superuser.execute("SELECT listener.pause('sales')")
    for arguments, line in (
        (["sales"], "sales is paused: nothing more is refreshed. Run: listener resume sales"),
        (["slaes"], "there is no managed view 'slaes'. Managed views: sales."),
    ):
        done = listener("fill", *arguments, url=shop.url())
        assert (done.returncode, done.stderr) == (1, f"listener: {line}\n")
    assert listener("fill", "sales", "--max-rate", "0", url=shop.url()).returncode == 2
    assert (await rows(superuser, "SELECT paused FROM listener.filling")) == [(True,)]
