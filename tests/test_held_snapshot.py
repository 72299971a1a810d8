"""While another session holds a snapshot open, dead rows stay; what is read over and over must not cross them."""

from __future__ import annotations

import json
from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, IsolationLevel

from conftest import Database
from shop import ANNA, BERT, SALES, application, create_view, differences, one, open_shop, order, settle

pytestmark = pytest.mark.anyio

ROUNDS = 800


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    async with database.connect("listener_service") as service:
        await settle(service)
    return database


async def blocks(connection: AsyncConnection[Any], query: LiteralString) -> int:
    """How many blocks a statement reads."""
    row = await one(connection, b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query.encode())  # type: ignore[arg-type]
    plan = (json.loads(row) if isinstance(row, str) else row)[0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


async def leave_to_itself(superuser: AsyncConnection[Any]) -> None:
    """Autovacuum may come at any moment or not at all: the test takes statistics itself, where they mislead most."""
    await superuser.execute(
        """
        DO $$ DECLARE name regclass; BEGIN
            FOR name IN SELECT oid FROM pg_class WHERE relnamespace = 'listener'::regnamespace AND relkind = 'r' LOOP
                EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', name);
            END LOOP;
        END $$
        """
    )


async def test_a_hot_key_is_read_as_cheaply_as_at_the_start(shop: Database) -> None:
    reads: dict[str, LiteralString] = {
        "version": "SELECT v.version FROM listener.managed_view m, shop.tenants t,"
        " LATERAL listener.known_version(m.id, t.id::text) v WHERE m.name = 'sales'",
        "nothing new": "SELECT count(*) FROM listener.drain()",
        "what is dirty": "SELECT count(*) FROM listener.pending_keys(false)",
        "purge": "SELECT listener.purge()",
    }
    async with (
        shop.connect() as superuser,
        shop.connect("listener_service") as service,
        shop.connect(autocommit=False) as holder,
        application(shop, ANNA) as app,
    ):
        await leave_to_itself(superuser)
        await order(app, ANNA, "a")
        await settle(service)
        await service.execute("SELECT listener.purge()")

        async def measured() -> dict[str, int]:
            read = {name: await blocks(service, query) for name, query in reads.items()}
            await order(app, ANNA, "a")
            read["a change"] = await blocks(service, "SELECT count(*) FROM listener.drain()")
            return read

        # Whatever a session reads of the catalog for the first time is no cost of ours.
        await measured()
        before = await measured()
        await holder.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        await holder.execute("SELECT count(*) FROM shop.tenants")
        for number in range(ROUNDS):
            await order(app, ANNA, "a")
            await service.execute("SELECT count(*) FROM listener.drain()")
            # Drained more often than refreshed, as under load.
            if number % 2 == 0:
                await service.execute("SELECT listener.refresh('sales', %s::text)", (ANNA,))
            if number % 40 == 0:
                # As many writers' rows; they are the hot tenant's, too.
                await superuser.execute(
                    """INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
                       SELECT pg_current_xact_id(), clock_timestamp(), s.id, %s
                       FROM listener.source s, generate_series(1, 2000)""",
                    (ANNA,),
                )
            if number % 10 == 9:
                await service.execute("SELECT listener.purge()")
        assert await one(superuser, "SELECT count(*) FROM listener.dirty_key") < 10
        await service.execute("SELECT count(*) FROM listener.drain()")
        await service.execute("SELECT listener.refresh('sales', %s::text)", (ANNA,))
        await service.execute("SELECT listener.purge()")
        # As autovacuum does, whenever it comes: plans may change, and still nothing is crossed.
        await superuser.execute("ANALYZE")
        await measured()
        after = await measured()
        for name in before:
            # Planning looks at an index's end, over a bounded number of dead entries; what each drain of a change and
            # each refresh reads may grow no more than a little.
            most = 2 * before[name] + 8 if name in {"purge", "nothing new"} else 1.5 * before[name] + 4
            assert after[name] <= most, (name, before, after)
        await settle(service)
        assert await differences(superuser, "sales") == []


async def test_what_is_deleted_in_batches_is_all_deleted_and_nothing_else(shop: Database) -> None:
    async with shop.connect() as superuser, shop.connect("listener_service") as service, shop.connect() as late:
        await late.set_autocommit(False)
        await order(late, BERT, "late")
        async with application(shop, ANNA) as app:
            for _ in range(25):
                await order(app, ANNA, "a")
        await service.execute("SELECT count(*) FROM listener.drain()")
        # An open transaction holds the line back: nothing at or above it may go.
        assert await one(service, "SELECT listener.purge('30 days', 10)") < 10
        await late.commit()
        await settle(service)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "b")
        await settle(service)
        deleted = []
        while True:
            deleted.append(await one(service, "SELECT listener.purge('30 days', 10)"))
            if deleted[-1] < 10:
                break
        assert max(deleted) == 10
        assert len(deleted) >= 3
        assert await one(superuser, "SELECT count(*) FROM listener.change_log") == 0
        assert await one(superuser, "SELECT count(*) FROM listener.dirty_key") == 0
        assert await one(superuser, "SELECT count(*) FROM listener.purge_mark") == 1
        assert await differences(superuser, "sales") == []
