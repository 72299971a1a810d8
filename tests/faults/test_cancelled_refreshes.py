"""A refresh that is cancelled half-way: nothing of it stays, neither on the server nor in the service."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio.lowlevel
import pytest
from psycopg import AsyncConnection

from books import value
from conftest import Database, eventually
from gates import FIRST, close, create_gated_view, open_gate, waiting_at
from on_call import explained, is_exact, open_letters, pauses_and_resumes
from shop import ANNA, SALES, application, create_view, order, rows

pytestmark = pytest.mark.anyio

# What the backend does, and whether it holds a key's lock: that of a transaction, of 64 bits.
STATE = """
    SELECT a.state, EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted)
    FROM pg_stat_activity a WHERE a.pid = %s
"""


@pytest.mark.parametrize("by", ["its scope", "pg_cancel_backend"])
async def test_a_cancelled_refresh_leaves_no_query_and_no_lock_and_is_done_later(
    shop: Database, superuser: AsyncConnection[Any], by: str
) -> None:
    await create_gated_view(shop, superuser)
    await create_view(shop, "sales", SALES, ["product"])
    # No sweep helps: what is not refreshed again by itself never is.
    async with shop.service(sweep_interval=3600.0, retry_base="100ms") as running, shop.connect() as holder:
        await eventually(lambda: is_exact(shop, "gated", "sales"))
        await close(holder, FIRST)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "tea")
        await eventually(lambda: waiting_at(superuser, FIRST))
        (backend,) = await waiting_at(superuser, FIRST)
        under_way = f"backend {backend} holds the key's lock"
        assert any(line.startswith(under_way) for line in await explained(shop, "gated", ANNA))
        await pauses_and_resumes(shop, "gated", ANNA)
        seen = len(running.outcomes)
        if by == "its scope":
            (scope,) = running.service.workers._under_way
            scope.cancel()
        else:
            await superuser.execute("SELECT pg_cancel_backend(%s)", (backend,))

        async def is_free() -> bool:
            # The pool may use the connection again, or have replaced it. It may not stand at the gate.
            return await rows(superuser, STATE, backend) in ([], [("idle", False)])

        await eventually(is_free)
        failed = value(running, "listener_refreshes_total", view="gated", outcome="failed")
        assert failed == (0 if by == "its scope" else 1)
        await open_gate(holder, FIRST)
        await running.until_refreshed("gated", ANNA, after=seen)
        await eventually(lambda: is_exact(shop, "gated", "sales"))
        assert await explained(shop, "gated", ANNA) == ["fresh"]
        assert await open_letters(superuser) == []
        # As many connections as there were, and each answers.
        for _ in range(running.service.pool.max_size):
            async with running.service.pool.connection(timeout=10) as connection:
                await connection.execute("SELECT 1")


async def test_a_connection_that_whoever_was_cancelled_gives_back_is_not_lost(shop: Database) -> None:
    async with shop.service(sweep_interval=3600.0, workers=1) as running, anyio.create_task_group() as tasks:
        service = running.service
        await eventually(lambda: service.drainer.doorbell.state == "resting")
        has_one, scope = anyio.Event(), anyio.CancelScope()

        async def use_one() -> None:
            with scope:
                async with service._connection():
                    has_one.set()
                    await anyio.sleep_forever()

        tasks.start_soon(use_one)
        await has_one.wait()
        # Another one is given or taken just then.
        async with service.pool._lock:
            scope.cancel()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
        async with AsyncExitStack() as taken:
            for _ in range(service.pool.max_size):
                await taken.enter_async_context(service.pool.connection(timeout=10))
