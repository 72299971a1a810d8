"""Verify in the background: what no change explains is counted, told with a row, and refreshed; and only that."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from command import listener
from conftest import Database, RunningService, eventually
from listener import view_queries
from shop import ANNA, BERT, CLEO, SALES, TENANTS, create_view, define, differences, one, order, rows, settle

pytestmark = pytest.mark.anyio

OFTEN = {"verify_keys": 6000, "sweep_interval": "100ms"}
CHECK = "SELECT outcome, missing, extra FROM listener.check_drift('sales', %s)"


@pytest.fixture
async def shop(shop: Database) -> Database:
    """A view of three tenants, filled."""
    await create_view(shop, "sales", SALES, ["product"], target_rls=True)
    async with shop.connect() as superuser, shop.connect("listener_service") as service:
        for tenant in TENANTS:
            await order(superuser, tenant, "tea", 3)
        await settle(service)
    return shop


def counted(running: RunningService, outcome: str) -> float:
    """How many comparisons came to this."""
    return running.service.metrics.registry.get_sample_value("listener_verified_total", {"outcome": outcome}) or 0


def drifted(running: RunningService, view: str = "sales") -> float | None:
    return running.service.metrics.registry.get_sample_value("listener_drift_total", {"view": view})


async def test_a_target_that_was_altered_by_hand_is_healed_counted_and_told_with_a_row(
    shop: Database, superuser: psycopg.AsyncConnection[Any]
) -> None:
    with capture_logs() as logs:
        async with shop.service(**OFTEN) as running:
            await eventually(lambda: counted(running, "exact") > 2 * len(TENANTS))
            assert not drifted(running)
            await superuser.execute("UPDATE sales SET orders = 1000 WHERE tenant_id = %s", (ANNA,))

            async def exact() -> bool:
                return not await differences(superuser, "sales")

            await eventually(exact)
            await eventually(lambda: drifted(running) == 1)
            # Once it is mended it is exact again.
            seen = counted(running, "exact")
            await eventually(lambda: counted(running, "exact") > seen + 2 * len(TENANTS))
            assert drifted(running) == 1
    (told,) = [line for line in logs if line["event"].startswith("a target differs")]
    assert (told["view"], told["tenant_id"], told["missing"], told["extra"]) == ("sales", ANNA, 1, 1)
    assert told["example"] == f"missing ({ANNA},tea,1,3)"
    (refreshed,) = [
        line for line in logs if line.get("app_correlation_id") == told["app_correlation_id"] and line != told
    ]
    assert (refreshed["event"], refreshed["tenant_id"], refreshed["updated"]) == ("refreshed", ANNA, 1)


async def test_a_change_that_is_not_shown_yet_is_no_drift(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    logged = "SELECT count(*) FROM listener.change_log WHERE view_id IS NOT NULL AND tenant = %s"
    marks = await one(superuser, logged, ANNA)
    await order(superuser, ANNA, "tea")
    assert await rows(service, CHECK, ANNA) == [("stale", 1, 1)]
    await service.execute("SELECT listener.drain()")
    assert await rows(service, CHECK, ANNA) == [("stale", 1, 1)]
    assert await one(superuser, logged, ANNA) == marks
    await settle(service)
    assert await rows(service, CHECK, ANNA) == [("exact", 0, 0)]


async def test_a_nested_view_that_was_replaced_is_left_to_the_sweep(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await create_view(shop, "busy", "SELECT tenant_id, product, quantity FROM shop.busy_orders", [])
    await settle(service)
    await define(
        superuser,
        "CREATE OR REPLACE VIEW shop.busy_orders WITH (security_invoker = true) AS"
        " SELECT * FROM shop.orders WHERE quantity > 100",
    )
    assert await rows(service, CHECK.replace("sales", "busy"), ANNA) == [("stale", 0, 1)]


async def test_a_key_that_somebody_is_at_is_left_alone(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await superuser.execute("UPDATE sales SET orders = 1000 WHERE tenant_id = %s", (ANNA,))
    async with shop.connect("listener_service", autocommit=False) as other:
        await other.execute("SELECT listener.refresh('sales', %s::text)", (ANNA,))
        assert await rows(service, CHECK, ANNA) == [("busy", None, None)]
        assert await rows(service, CHECK, BERT) == [("exact", 0, 0)]
    # Two replicas do not compare at the same time.
    async with shop.connect("listener_service", autocommit=False) as other:
        await other.execute(CHECK, (CLEO,))
        assert await rows(service, CHECK, BERT) == [("busy", None, None)]


async def test_every_key_comes_round_but_those_that_are_not_to_be_compared(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    await create_view(shop, "slow", SALES, ["product"])
    await create_view(shop, "dated", SALES, ["product"], max_age="1 hour")
    await create_view(shop, "held", SALES, ["product"])
    await create_view(
        shop, "whole", "SELECT sum(cents) AS cents FROM shop.prices", [], tenant_column=None, tenants_query=None
    )
    await settle(service)
    await superuser.execute("SELECT listener.pause('held')")
    await superuser.execute(
        "UPDATE listener.refresh_state SET duration = '2 s'"
        " WHERE view_id = (SELECT id FROM listener.managed_view WHERE name = 'slow')"
    )
    await superuser.execute(
        "UPDATE listener.refresh_state SET failures = 1 WHERE tenant = %s"
        " AND view_id = (SELECT id FROM listener.managed_view WHERE name = 'sales')", (CLEO,)
    )  # fmt: skip
    next_key = "SELECT view_id, tenant, view_name FROM listener.next_keys(%s, %s, 1, '1 s')"
    seen = []
    after: tuple[int, str] = (0, "")
    while found := await rows(service, next_key, *after):
        after = found[0][:2]
        seen.append((found[0][2], found[0][1]))
    assert seen == [("sales", ANNA), ("sales", BERT), ("whole", "")]
    # What the time has changed is no drift; once max_age has passed, the key should have been refreshed.
    await superuser.execute("UPDATE listener.managed_view SET max_age = '1 ms' WHERE name = 'dated'")
    assert ("dated", ANNA) in await rows(service, "SELECT view_name, tenant FROM listener.next_keys(0, '', 99, '1 s')")
    # From a random key on, where none is given.
    for _ in range(5):
        assert len(await rows(service, "SELECT * FROM listener.next_keys(NULL, '', 99, '1 s')")) <= 6


async def test_what_the_time_changes_is_no_drift_and_what_somebody_writes_is(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    timed = "SELECT tenant_id, count(*) AS orders, max(now()) AS at FROM shop.orders GROUP BY 1"
    await create_view(shop, "timed", timed, ["tenant_id"], max_age="1 hour")
    await create_view(shop, "aged", SALES, ["product"], max_age="1 hour")
    await settle(service)
    await superuser.execute("UPDATE aged SET orders = 1000 WHERE tenant_id = %s", (ANNA,))
    # Its age has passed, and no sweep has come by yet.
    await superuser.execute("UPDATE listener.managed_view SET max_age = '1 ms' WHERE max_age IS NOT NULL")
    outcome = "SELECT outcome FROM listener.check_drift(%s, %s::text)"
    assert await one(service, outcome, "timed", ANNA) == "stale"
    assert await one(service, outcome, "aged", ANNA) == "drift"


async def test_off_means_off(shop: Database, superuser: psycopg.AsyncConnection[Any]) -> None:
    async with shop.service(verify_keys=0, sweep_interval="50ms") as running:
        await superuser.execute("UPDATE sales SET orders = 1000 WHERE tenant_id = %s", (ANNA,))
        sweeps = 0
        done = running.service.verifying.go_on

        async def counting(connection: psycopg.AsyncConnection[Any]) -> bool:
            nonlocal sweeps
            sweeps += 1
            return await done(connection)

        running.service.verifying.go_on = counting  # type: ignore[method-assign]
        await eventually(lambda: sweeps > 5)
        assert not [
            f for f in running.service.metrics.registry.collect() if f.name == "listener_verified" and f.samples
        ]
        assert await differences(superuser, "sales") != []


async def test_a_comparison_that_takes_too_long_ends_and_holds_nothing_up(
    shop: Database, superuser: psycopg.AsyncConnection[Any], service: psycopg.AsyncConnection[Any]
) -> None:
    async with shop.connect(autocommit=False) as other:
        await other.execute("LOCK TABLE shop.orders IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(psycopg.errors.QueryCanceled):
            await view_queries.check_drift(service, "sales", ANNA, 0.2)
    found = await view_queries.check_drift(service, "sales", ANNA, 5)
    assert found["outcome"] == "exact"
    assert await one(service, "SHOW statement_timeout") == "0"


def test_a_wrong_setting_is_one_line() -> None:
    done = listener("run", url="postgresql://nobody@localhost:1/none", LISTENER_VERIFY_KEYS="-1")
    assert done.returncode == 1
    assert done.stderr.startswith("listener: LISTENER_VERIFY_KEYS is wrong: ")
