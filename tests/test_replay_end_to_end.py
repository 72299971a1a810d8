"""A real ledger of 25,900 invoices, replayed while the service runs; afterwards every target is exact."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from psycopg import sql

from conftest import Database, eventually
from listener import operations, view_queries
from listener.replay import read_ledger, replay

pytestmark = [pytest.mark.anyio, pytest.mark.ledger]


async def test_after_the_replay_every_view_has_rows_and_is_exact_for_all_tenants(
    sample: Database, recorded_ledger: Path
) -> None:
    async with sample.service() as running, sample.connect() as superuser:
        with anyio.fail_after(600):
            summary = await replay(read_ledger(recorded_ledger), sample.url("listener_app"))
        assert (summary.invoices, summary.tenants) == (25_900, 38)
        await eventually(lambda: view_queries.all_fresh(superuser))
        assert running.outcomes
    async with sample.connect("listener_service") as service:
        views = [row["view"] for row in await view_queries.views(service)]
        found = [(done, difference) async for done, _, difference in operations.verify(service, views)]
    assert found[-1][0] == 38 * len(views) == 190
    assert [difference for _, difference in found if difference is not None] == []
    # The oracle: the plain query over all tenants at once, by a superuser, both ways.
    async with sample.connect() as superuser:
        managed = await (
            await superuser.execute("SELECT query, target_schema, target_name FROM listener.managed_view")
        ).fetchall()
        for query, schema, name in managed:
            target = sql.Identifier(schema, name)
            definition = sql.SQL(query)
            for one, other in (
                (definition, sql.SQL("SELECT * FROM {}").format(target)),
                (sql.SQL("SELECT * FROM {}").format(target), definition),
            ):
                cursor = await superuser.execute(sql.SQL("({}) EXCEPT ALL ({})").format(one, other))
                assert await cursor.fetchall() == [], name
            row = await (await superuser.execute(sql.SQL("SELECT count(*) FROM {}").format(target))).fetchone()
            assert row is not None
            assert row[0] > 0
