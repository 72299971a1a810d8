"""Definitions with more than one right result: a key that drifts again with no change between is reported once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from command import listener
from conftest import Database, eventually
from shop import create_view, one, rows, settle

pytestmark = pytest.mark.anyio

CHECK = "SELECT outcome, missing, extra, example IS NOT NULL FROM listener.check_drift(%s, %s)"
MARKS = "SELECT count(*) FROM listener.change_log WHERE view_id IS NOT NULL AND tenant = %s"
KNOWN = "SELECT listener.is_undetermined(%s, %s)"
# Each has a tie: whichever row is read first is shown.
TIED = "SELECT DISTINCT ON (tenant_id) tenant_id, id, v FROM items ORDER BY tenant_id, v"
CHANCE = "SELECT tenant_id, max(id) AS id, max(random()) AS r FROM items GROUP BY tenant_id"


@pytest.fixture
async def items(database: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """The superuser, and a table of ties."""
    async with database.connect() as superuser:
        await superuser.execute(
            """SET ROLE listener_owner;
               CREATE TABLE items (id int PRIMARY KEY, tenant_id text NOT NULL, v int);
               CREATE INDEX down ON items (id DESC); CREATE INDEX ON items (tenant_id);
               INSERT INTO items SELECT i, 't1', i % 10 FROM generate_series(1, 500) i;
               INSERT INTO items VALUES (1001, 't2', 1);
               GRANT SELECT ON items TO listener_service;
               RESET ROLE; GRANT CREATE, USAGE ON SCHEMA public TO listener_owner, listener_migrator;
               ANALYZE items"""
        )
        yield superuser


async def fill(database: Database, query: str) -> None:
    """Registers `v` and fills it."""
    await create_view(database, "v", query, [], tenants_query=None)
    async with database.connect("listener_service") as service:
        await settle(service)


async def test_what_differs_right_after_a_refresh_is_not_determined(
    items: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await fill(database, CHANCE)
    async with database.connect("listener_service") as service:
        assert await rows(service, CHECK, "v", "t1") == [("drift", 1, 1, True)]
        await settle(service)
        marks = await one(items, MARKS, "t1")
        assert await one(service, KNOWN, "v", "t1") is False
        assert await rows(service, CHECK, "v", "t1") == [("undetermined", 1, 1, True)]
        shown = await rows(items, "SELECT * FROM v ORDER BY tenant_id")
        # From then on it is neither reported nor refreshed.
        for _ in range(3):
            assert await rows(service, CHECK, "v", "t1") == [("undetermined", 1, 1, False)]
        assert await one(service, KNOWN, "v", "t1") is True
        assert await rows(items, "SELECT * FROM v ORDER BY tenant_id") == shown
        assert await one(items, MARKS, "t1") == marks
        assert await one(service, KNOWN, "v", "t2") is False
        # A change is shown, and the key is judged again.
        await items.execute("INSERT INTO items VALUES (999, 't1', 1)")
        await settle(service)
        assert await one(items, "SELECT id FROM v WHERE tenant_id = 't1'") == 999
        assert await one(service, KNOWN, "v", "t1") is False
        assert await rows(service, CHECK, "v", "t1") == [("undetermined", 1, 1, True)]


async def test_what_differs_again_with_no_change_between_is_not_determined(
    items: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await fill(database, TIED)
    async with database.connect("listener_service") as service:
        # No row is written: they only lie in another order.
        await items.execute("CLUSTER items USING down")
        assert await rows(service, CHECK, "v", "t1") == [("drift", 1, 1, True)]
        await settle(service)
        assert await rows(service, CHECK, "v", "t1") == [("exact", 0, 0, False)]
        await items.execute("CLUSTER items USING items_pkey")
        assert await rows(service, CHECK, "v", "t1") == [("drift", 1, 1, True)]
        # It was refreshed at once.
        assert await rows(service, CHECK, "v", "t1") == [("exact", 0, 0, False)]
        await items.execute("CLUSTER items USING down")
        assert await rows(service, CHECK, "v", "t1") == [("undetermined", 1, 1, True)]
        await items.execute("CLUSTER items USING items_pkey")
        assert await rows(service, CHECK, "v", "t1") == [("undetermined", 1, 1, False)]


async def test_a_target_that_is_altered_twice_is_healed_twice(
    items: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await fill(database, "SELECT tenant_id, count(*) AS n FROM items GROUP BY 1")
    async with database.connect("listener_service") as service:
        for _ in range(2):
            await items.execute("UPDATE v SET n = 0 WHERE tenant_id = 't1'")
            assert await rows(service, CHECK, "v", "t1") == [("drift", 1, 1, True)]
            await settle(service)
            assert await one(items, "SELECT n FROM v WHERE tenant_id = 't1'") == 500
            assert await rows(service, CHECK, "v", "t1") == [("exact", 0, 0, False)]
        assert await one(service, KNOWN, "v", "t1") is False


async def test_a_running_service_reports_it_once_and_rests(
    items: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await fill(database, CHANCE)

    def counted(outcome: str) -> float:
        registry = running.service.metrics.registry
        return registry.get_sample_value("listener_verified_total", {"outcome": outcome}) or 0

    with capture_logs() as logs:
        async with database.service(verify_keys=6000, sweep_interval="100ms") as running:
            await eventually(lambda: counted("undetermined") > 20)
    reported = [line for line in logs if line["event"].startswith("a definition has more than one right result")]
    assert sorted((line["view"], line["tenant_id"]) for line in reported) == [("v", "t1"), ("v", "t2")]
    assert len([line for line in logs if line["event"].startswith("a target differs")]) == 2


async def test_verify_and_doctor_say_not_determined(items: psycopg.AsyncConnection[Any], database: Database) -> None:
    await fill(database, CHANCE)
    async with database.connect("listener_service") as service:
        for tenant in ("t1", "t2"):
            await service.execute(CHECK, ("v", tenant))
            await settle(service)
            await service.execute(CHECK, ("v", tenant))
    done = listener("verify", "v", url=database.url())
    assert "2 keys compared, 0 stale, 0 different, 2 not determined, 0 failed" in done.stdout
    assert done.returncode == 1
    (found,) = [
        row
        for row in await rows(items, "SELECT level, problem, mend FROM listener.result_findings()")
        if row[0] != "ok"
    ]
    assert found[0] == "warning"
    assert found[1].startswith("2 keys of it have more than one right result")
    assert found[2] == "listener views alter v --query FILE"


async def test_what_parallel_workers_would_decide_is_compared_as_it_was_computed(
    items: psycopg.AsyncConnection[Any], database: Database
) -> None:
    await items.execute(
        """INSERT INTO items SELECT i, 't3', 1 FROM generate_series(2000, 40000) i;
           ANALYZE items;
           ALTER DATABASE current SET parallel_setup_cost = 0""".replace("current", database.name)
    )
    for setting in ("parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0", "min_parallel_index_scan_size = 0"):
        await items.execute(f"ALTER DATABASE {database.name} SET {setting}".encode())
    await fill(database, "SELECT tenant_id, array_agg(id) AS ids, sum(1.0 / id::float8) AS n FROM items GROUP BY 1")
    async with database.connect("listener_service") as service:
        for _ in range(3):
            assert await rows(service, CHECK, "v", "t3") == [("exact", 0, 0, False)]
