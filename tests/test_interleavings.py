"""Writers, drainers and refreshers at once for a while, in every order that chance brings; then nothing is missing.

Meanwhile a checker asks for random keys: a target that differs from its definition must be known to be stale, in the
very snapshot that shows the difference. LISTENER_TEST_SECONDS (20) says for how long; the seed is printed.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection

from conftest import Database
from shop import BALANCE, SALES, TENANTS, application, create_view, differences, one, open_shop, rows, settle

pytestmark = pytest.mark.anyio

SECONDS = float(os.environ.get("LISTENER_TEST_SECONDS", "20"))
VIEWS = ("sales", "balance", "guarded")
PRODUCTS = ("apple", "bread", "cheese", None)

GRANTS = """
    GRANT USAGE ON SCHEMA listener TO shop_app;
    GRANT EXECUTE ON FUNCTION listener.drain(), listener.refresh(text, text) TO shop_app
"""

Chance = random.Random
Act = Callable[[AsyncConnection[Any], Chance], Awaitable[None]]


class Run:
    """One run: what everybody shares."""

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.seed = seed
        self.did: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.ends_at = anyio.current_time() + SECONDS

    async def repeat(self, connection: AsyncConnection[Any], act: Act, who: str) -> None:
        """`act` until the time is over, each time after a short pause on the server."""
        chance = Chance(f"{self.seed} {who}")
        while anyio.current_time() < self.ends_at:
            await act(connection, chance)
            self.did[who.split(maxsplit=1)[0]] += 1

    async def write_as_application(self, number: int) -> None:
        """A writer for one tenant, whose transactions now and then drain or refresh and go on."""
        tenant = TENANTS[number % len(TENANTS)]
        async with application(self.database, tenant, autocommit=False) as app:

            async def act(connection: AsyncConnection[Any], chance: Chance) -> None:
                await self.transaction(connection, chance, tenant)

            await self.repeat(app, act, f"writer {number}")

    async def transaction(self, app: AsyncConnection[Any], chance: Chance, tenant: str) -> None:
        try:
            for _ in range(chance.randint(1, 4)):
                await self.step(app, chance, tenant)
                await pause(app, chance)
            if chance.random() < 0.2:
                await app.rollback()
                self.did["rollback"] += 1
            else:
                await app.commit()
        except psycopg.errors.DeadlockDetected:
            await app.rollback()
            self.did["deadlock"] += 1

    async def step(self, app: AsyncConnection[Any], chance: Chance, tenant: str) -> None:
        product, quantity = chance.choice(PRODUCTS), chance.randint(1, 9)
        match chance.randrange(9):
            case 0 | 1:
                await app.execute(
                    "INSERT INTO shop.orders (tenant_id, product, quantity) VALUES (%s, %s, %s)",
                    (tenant, product, quantity),
                )
            case 2:
                await app.execute(
                    "INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, %s, %s)",
                    (tenant, product, quantity),
                )
            case 3 | 4:
                await app.execute(
                    "UPDATE shop.orders SET quantity = %s, product = %s WHERE id %% 7 = %s",
                    (quantity, product, chance.randrange(7)),
                )
            case 5:
                await app.execute("DELETE FROM shop.orders WHERE id %% 5 = %s", (chance.randrange(5),))
            case 6:
                async with app.transaction(force_rollback=chance.random() < 0.5):
                    await app.execute("UPDATE shop.payments SET cents = %s WHERE product = %s", (quantity, product))
            case 7:
                outcome = await one(app, "SELECT outcome FROM listener.drain()")
                self.did[f"drain inside a transaction: {outcome}"] += 1
            case _:
                outcome = await one(
                    app, "SELECT outcome FROM listener.refresh(%s, %s::text)", chance.choice(VIEWS), tenant
                )
                self.did[f"refresh inside a transaction: {outcome}"] += 1

    async def move_rows(self) -> None:
        """Rows that change their tenant, and tables that are emptied: row-level security lets no application do it."""

        async def act(connection: AsyncConnection[Any], chance: Chance) -> None:
            if chance.random() < 0.02:
                await connection.execute("TRUNCATE shop.payments")
                return
            try:
                await connection.execute(
                    "UPDATE shop.orders SET tenant_id = %s WHERE id %% 11 = %s",
                    (chance.choice(TENANTS), chance.randrange(11)),
                )
            except psycopg.errors.DeadlockDetected:
                self.did["deadlock"] += 1
            await pause(connection, chance)

        async with self.database.connect() as superuser:
            await self.repeat(superuser, act, "mover")

    async def drain(self, number: int) -> None:
        async def act(service: AsyncConnection[Any], chance: Chance) -> None:
            async with service.transaction(force_rollback=chance.random() < 0.1):
                outcome = await one(service, "SELECT outcome FROM listener.drain()")
                await pause(service, chance)
            self.did[f"drain: {outcome}"] += 1
            if chance.random() < 0.1:
                await service.execute("SELECT listener.purge()")

        async with self.database.connect("listener_service") as service:
            await self.repeat(service, act, f"drainer {number}")

    async def refresh(self, number: int) -> None:
        async def act(service: AsyncConnection[Any], chance: Chance) -> None:
            keys = await rows(service, "SELECT view_name, tenant FROM listener.pending_keys(false)")
            await pause(service, chance)
            if not keys:
                return
            view, tenant = chance.choice(keys)
            async with service.transaction(force_rollback=chance.random() < 0.1):
                if tenant == "":
                    await service.execute("SELECT listener.expand(%s)", (view,))
                else:
                    outcome = await one(service, "SELECT outcome FROM listener.refresh(%s, %s::text)", view, tenant)
                    self.did[f"refresh: {outcome}"] += 1
                await pause(service, chance)

        async with self.database.connect("listener_service") as service:
            await self.repeat(service, act, f"refresher {number}")

    async def check(self) -> None:
        async def act(service: AsyncConnection[Any], chance: Chance) -> None:
            view, tenant = chance.choice(VIEWS), chance.choice(TENANTS)
            compared = await rows(service, "SELECT missing, extra, stale FROM listener.compare(%s, %s)", view, tenant)
            missing, extra, stale = compared[0]
            if missing or extra:
                self.did["differs"] += 1
                if not stale:
                    self.wrong.append((view, tenant, missing, extra))

        async with self.database.connect("listener_service") as service:
            await self.repeat(service, act, "checker")


async def pause(connection: AsyncConnection[Any], chance: Chance) -> None:
    """A few milliseconds on the server, with whatever the transaction holds."""
    await connection.execute("SELECT pg_sleep(%s)", (chance.choice((0, 0.001, 0.002, 0.008)),))


async def test_after_any_interleaving_every_target_equals_its_definition(database: Database) -> None:
    seed = int(os.environ.get("LISTENER_TEST_SEED", random.randrange(10**9)))
    print(f"LISTENER_TEST_SEED={seed}")
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"])
    await create_view(database, "guarded", SALES, ["product"], target_rls=True)
    async with database.connect() as superuser, database.connect("listener_service") as service:
        await superuser.execute(GRANTS)
        run = Run(database, seed)
        async with anyio.create_task_group() as tasks:
            for number in range(7):
                tasks.start_soon(run.write_as_application, number)
            tasks.start_soon(run.move_rows)
            for number in range(2):
                tasks.start_soon(run.drain, number)
            for number in range(3):
                tasks.start_soon(run.refresh, number)
            tasks.start_soon(run.check)
        print(dict(sorted(run.did.items())))
        assert run.wrong == [], "differs, and nothing known explains it: a change was missed"
        await settle(service)
        for view in VIEWS:
            assert await differences(superuser, view) == [], view
            for tenant in TENANTS:
                compared = "SELECT missing, extra, stale FROM listener.compare(%s, %s)"
                assert await rows(service, compared, view, tenant) == [(0, 0, False)], (view, tenant)
    for expected in ("drain: drained", "refresh: refreshed", "rollback", "differs"):
        assert run.did[expected], f"the run did not exercise: {expected}"
