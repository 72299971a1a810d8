"""Backends that are killed, one by one and all at once: the service replaces them, and no change is lost."""

from __future__ import annotations

import random
import uuid
from functools import partial

import anyio
import pytest

from backends import DRAIN, LISTENING, POOL, REFRESH, backends, caught, kill, locked, until_well
from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import Database, eventually

pytestmark = pytest.mark.anyio

NO_SWEEP = {"sweep_interval": "1h"}


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def test_a_killed_listening_backend_is_replaced(books: Database) -> None:
    async with books.connect() as superuser, books.service(**NO_SWEEP) as running:
        await settled(books, running)
        await kill(superuser, *await backends(superuser, LISTENING))
        await eventually(lambda: value(running, "listener_reconnects_total") > 0)
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)


async def test_a_refresh_whose_backend_is_killed_in_the_middle_is_done_again(books: Database) -> None:
    async with books.connect() as superuser, books.service(**NO_SWEEP) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with locked(books, "dashboard", "mv_realtime_revenue"):
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await kill(superuser, await caught(superuser, REFRESH))
            # The other views of the tenant go on meanwhile.
            await running.until_refreshed("mv_daily_revenue_summary", ANNA, after=seen)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)
    assert await revenue(books) == 1


async def test_a_drain_whose_backend_is_killed_in_the_middle_is_done_again(books: Database) -> None:
    async with books.connect() as superuser, books.service(**NO_SWEEP) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with locked(books, "listener", "dirty_key"):
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await kill(superuser, await caught(superuser, DRAIN))
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)
    assert await revenue(books) == 1


async def test_a_killed_pool_loses_nothing(books: Database) -> None:
    async with books.connect() as superuser, books.service(**NO_SWEEP) as running:
        await settled(books, running)
        for cents in range(1, 6):
            seen = len(running.outcomes)
            async with transaction(books) as application:
                await book(application, ANNA, cents * 100)
            await kill(superuser, *await backends(superuser, POOL))
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)
    assert await revenue(books) == 15


async def test_all_backends_killed_again_and_again_under_load_lose_nothing(books: Database) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    written = {ANNA: 0, BEN: 0}
    enough = anyio.Event()
    async with books.connect() as superuser, books.service(**NO_SWEEP) as running:
        await settled(books, running)
        async with anyio.create_task_group() as load:

            async def write(tenant: uuid.UUID) -> None:
                while not enough.is_set():
                    async with transaction(books, tenant) as application:
                        await book(application, tenant, 100)
                    written[tenant] += 1

            def at_least(number: int) -> bool:
                return sum(written.values()) >= number

            def more_outcomes_than(number: int) -> bool:
                return len(running.outcomes) > number

            for tenant in written:
                load.start_soon(write, tenant)
            for _ in range(8):
                await eventually(partial(at_least, chance.randrange(1, 20) + sum(written.values())))
                await kill(superuser, *await backends(superuser, LISTENING), *await backends(superuser, POOL))
                seen = len(running.outcomes)
                await running.until(partial(more_outcomes_than, seen))
            enough.set()
        await eventually(lambda: running.service.listening.probe_answered)
        await until_well(books, running)
    async with books.connect() as superuser:
        found = await superuser.execute("SELECT tenant_id, total_revenue::int FROM mv_realtime_revenue")
        assert dict(await found.fetchall()) == written
