"""A session that sits in a transaction for the whole run, here or in another database: everybody else stays fresh."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, IsolationLevel

from books import value
from conftest import Database, eventually
from on_call import explained, is_exact, pauses_and_resumes
from shop import ANNA, BERT, CLEO, SALES, application, create_view, one, order

pytestmark = pytest.mark.anyio

WRITES: LiteralString = "INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'sat on')"


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in this database", "in another database"])
@pytest.mark.parametrize("writes", [False, True], ids=["holds a snapshot", "wrote and sits on it"])
async def test_an_open_transaction_makes_nobody_else_stale_and_the_metric_shows_it(
    shop: Database, superuser: AsyncConnection[Any], *, elsewhere: bool, writes: bool
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    where = Database(shop.server, "postgres") if elsewhere else shop
    async with where.connect(autocommit=False) as idle:
        await idle.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        if not writes:
            await idle.execute("SELECT FROM pg_class")
        elif elsewhere:
            await idle.execute("SELECT pg_current_xact_id()")
        else:
            await idle.execute(WRITES, (CLEO,))
        # No sweep: what the doorbell and the polls do not bring is not shown.
        async with shop.service(sweep_interval=3600.0) as running:
            await eventually(lambda: is_exact(shop, "sales"))
            async with application(shop, ANNA) as anna, application(shop, BERT) as bert:
                for number in range(1, 4):
                    for session, tenant in ((anna, ANNA), (bert, BERT)):
                        seen = len(running.outcomes)
                        await order(session, tenant, "tea")
                        await running.until_refreshed("sales", tenant, after=seen)
                        shown = "SELECT orders FROM public.sales WHERE tenant_id = %s AND product = 'tea'"
                        assert await one(superuser, shown, tenant) == number
            assert await explained(shop, "sales", ANNA) == ["fresh"]
            # The rows of whoever sits are nobody's before the commit.
            assert await explained(shop, "sales", CLEO) == ["fresh"]
            await pauses_and_resumes(shop, "sales", ANNA)
            age = "SELECT extract(epoch FROM now() - xact_start)::float8 FROM pg_stat_activity WHERE pid = %s"
            at_least = await one(superuser, age, idle.info.backend_pid)
            await running.service._update_gauges()
            assert value(running, "listener_oldest_transaction_age_seconds") >= at_least > 0
            assert await running.service.reasons_not_ready() == []
            await idle.commit()
            await eventually(lambda: is_exact(shop, "sales"))
            sat_on = await one(superuser, "SELECT count(*) FROM public.sales WHERE product = 'sat on'")
            assert sat_on == (1 if writes and not elsewhere else 0)
            # The service, which looked by itself as long as somebody might have seen its lease, rests.
            await eventually(lambda: running.service.drainer.doorbell.state == "resting")
