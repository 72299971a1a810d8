"""Failures of a refresh that pass by themselves, each raised by the server: tried again, and shown without a hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, LiteralString, NamedTuple

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection, sql

from books import value
from conftest import Database, RunningService, eventually
from gates import FIRST, SECOND, close, create_gated_view, open_gate, waiting_at
from listener.views import Change
from on_call import explained, is_exact, open_letters, pauses_and_resumes
from shop import ANNA, BERT, application, create_view, one, order

pytestmark = pytest.mark.anyio

PAID = "SELECT tenant_id, product, sum(cents)::bigint AS cents FROM shop.payments GROUP BY 1, 2"
Write = Callable[[], Awaitable[None]]


@asynccontextmanager
async def too_slow(shop: Database, write: Write) -> AsyncIterator[None]:
    """The refresh waits for longer than statement_timeout allows."""
    async with shop.connect() as holder:
        await close(holder, FIRST)
        await write()
        yield


@asynccontextmanager
async def locked_table(shop: Database, write: Write) -> AsyncIterator[None]:
    """Somebody's migration sits on the target, for longer than lock_timeout allows."""
    async with shop.connect(autocommit=False) as migration:
        await migration.execute("LOCK TABLE public.gated IN ACCESS EXCLUSIVE MODE")
        await write()
        yield


@asynccontextmanager
async def deadlock(shop: Database, write: Write) -> AsyncIterator[None]:
    """A transaction of the application waits for the refresh, which goes on and waits for that transaction."""
    async with shop.connect() as holder, shop.connect(autocommit=False) as app, anyio.create_task_group() as tasks:
        await close(holder, FIRST)
        # The application does not look for deadlocks: the refresh is to be the victim.
        await app.execute("SET deadlock_timeout = '1min'")
        await app.execute("SELECT pg_advisory_xact_lock(%s)", (SECOND,))
        await write()
        await eventually(lambda: waiting_at(holder, FIRST))

        async def wait_for_the_refresh() -> None:
            await app.execute("LOCK TABLE shop.orders IN ACCESS EXCLUSIVE MODE")

        async def waits() -> bool:
            return bool(await one(holder, "SELECT cardinality(pg_blocking_pids(%s)) > 0", app.info.backend_pid))

        tasks.start_soon(wait_for_the_refresh)
        await eventually(waits)
        await open_gate(holder, FIRST)
        yield


# In READ COMMITTED the server raises 40001 for a row that is to be locked and moves to another partition alone.
LOCKS_A_ROW: LiteralString = """
    CREATE TABLE shop.shelves (shelf int) PARTITION BY LIST (shelf);
    CREATE TABLE shop.left_shelf PARTITION OF shop.shelves FOR VALUES IN (1);
    CREATE TABLE shop.right_shelf PARTITION OF shop.shelves FOR VALUES IN (2);
    INSERT INTO shop.shelves VALUES (1);
    GRANT ALL ON shop.shelves TO shop_owner;
    CREATE OR REPLACE FUNCTION shop.gate(number int) RETURNS int LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$ BEGIN
        PERFORM FROM shop.shelves FOR KEY SHARE;
        RETURN 0;
    END $$;
"""


@asynccontextmanager
async def moved_row(shop: Database, write: Write) -> AsyncIterator[None]:
    """The application moves a row to another partition, which a function of the definition waits for to lock it."""
    async with shop.connect(autocommit=False) as app, shop.connect() as superuser:
        await app.execute("UPDATE shop.shelves SET shelf = 2")
        await write()

        async def is_waited_for() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
            return bool(await one(superuser, query, app.info.backend_pid))

        await eventually(is_waited_for)
        await app.commit()
        yield


@asynccontextmanager
async def full_lock_table(shop: Database, write: Write) -> AsyncIterator[None]:
    """A session takes every lock that the server has room for, while the refresh stands between two of its own."""
    async with shop.connect() as holder, shop.connect() as greedy:
        await close(holder, FIRST)
        await write()
        await eventually(lambda: waiting_at(holder, FIRST))
        with pytest.raises(psycopg.errors.OutOfMemory):
            await greedy.execute("SELECT pg_advisory_lock(generate_series(1000, 100000000))")
        await open_gate(holder, FIRST)
        yield


class Fault(NamedTuple):
    sqlstate: str
    begin: Callable[[Database, Write], AbstractAsyncContextManager[None]]
    arrange: LiteralString = ""
    of_the_role: LiteralString = "ALTER ROLE listener_service IN DATABASE {} SET deadlock_timeout = '100ms'"


FAULTS = {
    "statement timeout": Fault("57014", too_slow),
    "lock timeout": Fault(
        "55P03",
        locked_table,
        of_the_role="ALTER ROLE listener_service IN DATABASE {} SET lock_timeout = '50ms'",
    ),
    "deadlock": Fault("40P01", deadlock),
    "serialization failure": Fault("40001", moved_row, arrange=LOCKS_A_ROW),
    "lock table full": Fault("53200", full_lock_table),
}


async def arrange(shop: Database, superuser: AsyncConnection[Any], fault: Fault) -> None:
    await create_gated_view(shop, superuser)
    await create_view(shop, "paid", PAID, ["product"])
    await superuser.execute(fault.arrange)
    await superuser.execute(sql.SQL(fault.of_the_role).format(sql.Identifier(shop.name)))
    for tenant in (ANNA, BERT):
        async with application(shop, tenant) as app:
            await order(app, tenant, "tea")


def failures(running: RunningService) -> float:
    return value(running, "listener_refreshes_total", view="gated", outcome="failed")


def raised_by(running: RunningService) -> list[str | None]:
    """The SQLSTATEs of the refreshes that fail from now on: where the lock table is full, nothing else can tell."""
    raised: list[str | None] = []
    workers = running.service.workers
    failed = workers._failed

    async def noted(change: Change, error: psycopg.Error) -> float | None:
        raised.append(error.sqlstate)
        return await failed(change, error)

    workers._failed = noted  # type: ignore[method-assign]
    return raised


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_failure_that_passes_is_tried_again_and_shown_without_a_hand(
    shop: Database, superuser: AsyncConnection[Any], fault: Fault
) -> None:
    await arrange(shop, superuser, fault)
    settings = {"retry_base": "50ms", "retry_cap": "200ms", "statement_timeout": "3s", "sweep_interval": 3600.0}
    if fault.begin is too_slow:
        settings["statement_timeout"] = "300ms"
    async with shop.service(max_attempts=100, **settings) as running:
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        raised = raised_by(running)
        seen = len(running.outcomes)

        async def write() -> None:
            async with application(shop, ANNA) as app:
                await order(app, ANNA, "tea", 5)

        async with fault.begin(shop, write):
            await eventually(lambda: failures(running) > 0)
        assert set(raised) == {fault.sqlstate}
        await running.until_refreshed("gated", ANNA, after=seen)
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        assert await one(superuser, "SELECT max(failures) FROM listener.refresh_state") == 0
        # Nor was there one meanwhile. With all locks taken it could not have been asked.
        assert await one(superuser, "SELECT count(*) FROM listener.dead_letter") == 0
        assert await running.service.reasons_not_ready() == []


@pytest.mark.parametrize(("kind", "attempts"), [("lock timeout", 6), ("statement timeout", 2)])
async def test_what_passes_by_itself_and_fails_quickly_has_three_times_the_attempts_of_other_failures(
    shop: Database, superuser: AsyncConnection[Any], kind: str, attempts: int
) -> None:
    fault = FAULTS[kind]
    await arrange(shop, superuser, fault)
    brisk = {"retry_base": "20ms", "retry_cap": "50ms", "retry_quarantined": "200ms", "statement_timeout": "300ms"}
    async with shop.service(max_attempts=2, **brisk) as running:
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        seen = len(running.outcomes)

        async def write() -> None:
            async with application(shop, ANNA) as app:
                await order(app, ANNA, "tea", 5)

        async with fault.begin(shop, write):
            await eventually(lambda: open_letters(superuser))
            assert await open_letters(superuser) == [("gated", ANNA, fault.sqlstate)]
            first = "SELECT min(r.failures) FROM listener.refresh_state r WHERE r.failures > 0"
            assert await one(superuser, first) >= attempts
            assert failures(running) >= attempts
            # The other view, whose tables are free, goes on; and so does what an operator asks for.
            async with application(shop, ANNA) as app:
                await app.execute(
                    "INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'tea', 5)", (ANNA,)
                )
            await running.until_refreshed("paid", ANNA, after=seen)
            said = "; ".join(await explained(shop, "gated", ANNA))
            assert said.startswith("stale; ")
            assert f"({fault.sqlstate})" in said
            assert "it is quarantined" in said
            await pauses_and_resumes(shop, "gated", ANNA)
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        assert await open_letters(superuser) == []


async def test_explain_names_who_holds_what_a_refresh_waits_for(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await arrange(shop, superuser, FAULTS["deadlock"])
    async with shop.service(sweep_interval=3600.0) as running, shop.connect(autocommit=False) as migration:
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        seen = len(running.outcomes)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "tea", 5)
        await migration.execute("LOCK TABLE public.gated IN ACCESS EXCLUSIVE MODE")
        async with application(shop, BERT) as app:
            await order(app, BERT, "tea", 5)
        waits_for = f"it waits for a lock of backend {migration.info.backend_pid}, idle in transaction: LOCK TABLE"

        async def is_told() -> bool:
            return any(line.startswith(waits_for) for line in await explained(shop, "gated", BERT))

        await eventually(is_told)
        await pauses_and_resumes(shop, "gated", BERT)
        await migration.rollback()
        await running.until_refreshed("gated", BERT, after=seen)
        await eventually(lambda: is_exact(shop, "gated", "paid"))
        assert await explained(shop, "gated", BERT) == ["fresh"]
