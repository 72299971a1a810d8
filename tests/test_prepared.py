"""Prepared transactions: PREPARE TRANSACTION refuses one that notified, so where they are allowed capture is silent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, errors

from conftest import Database, Server, install, server_of, start_embedded
from shop import ANNA, BERT, SALES, application, create_view, differences, one, open_shop, order, settle

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Server, str]]:
    """A server that allows prepared transactions; a database with the schema listener and nothing else."""
    with start_embedded(max_prepared_transactions="10", wal_level="logical") as embedded:
        server = server_of(embedded)
        name = server.clone("template0")
        install(server, name)
        yield server, name


@pytest.fixture
async def shop(cluster: tuple[Server, str]) -> Database:
    server, template = cluster
    database = Database(server, server.clone(template))
    await open_shop(database)
    await create_view(database, "sales", SALES, ["product"])
    async with database.connect("listener_service") as service:
        await service.execute("SELECT listener.repair_capture()")  # this database is a copy of another
        await settle(service)
    return database


async def prepare(app: AsyncConnection[Any], tenant: str) -> None:
    await order(app, tenant, "prepared")
    await app.execute("PREPARE TRANSACTION 'shop'")


async def end(superuser: AsyncConnection[Any], *, how: str) -> None:
    await superuser.execute({"commit": "COMMIT PREPARED 'shop'", "rollback": "ROLLBACK PREPARED 'shop'"}[how])


async def orders(superuser: AsyncConnection[Any], product: str) -> int:
    found: int = await one(
        superuser, "SELECT coalesce(sum(orders), 0)::int FROM public.sales WHERE product = %s", product
    )
    return found


async def test_a_prepared_write_is_shown_once_it_is_committed_without_a_sweep(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    assert await one(service, "SELECT listener.must_poll()") is True
    async with shop.service(sweep_interval=3600.0) as running:
        async with application(shop, ANNA, autocommit=False) as app:
            await prepare(app, ANNA)
        async with application(shop, BERT) as app:
            await order(app, BERT, "meanwhile")
        await running.until_refreshed("sales", BERT)
        assert await orders(superuser, "prepared") == 0
        seen = len(running.outcomes)
        await end(superuser, how="commit")
        await running.until_refreshed("sales", ANNA, after=seen)
    assert await orders(superuser, "prepared") == 1
    assert await differences(superuser, "sales") == []


async def test_a_prepared_write_that_is_rolled_back_refreshes_nothing(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    async with shop.service(sweep_interval=3600.0) as running:
        async with application(shop, ANNA, autocommit=False) as app:
            await prepare(app, ANNA)
        await end(superuser, how="rollback")
        # Later than the rollback: once this is shown, the log was looked at after it.
        async with application(shop, BERT) as app:
            await order(app, BERT, "after it")
        await running.until_refreshed("sales", BERT)
        assert [change.key.tenant for change, _ in running.outcomes] == [BERT]
    assert await orders(superuser, "prepared") == 0
    assert await one(superuser, "SELECT count(*) FROM listener.change_log WHERE tenant = %s", ANNA) == 0


async def test_a_prepared_write_outlives_the_drains_and_the_purge_that_came_between(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with application(shop, ANNA, autocommit=False) as app:
        await prepare(app, ANNA)
    for _ in range(2):
        await order(superuser, BERT, "meanwhile")
        assert await settle(service) == 1
        await service.execute("SELECT listener.purge()")
    await end(superuser, how="commit")
    assert await settle(service) == 1
    assert await differences(superuser, "sales") == []


async def test_an_operator_who_wants_notifications_gives_prepared_transactions_up(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await superuser.execute("SELECT listener.set_notify('when_idle')")
    assert await one(service, "SELECT listener.must_poll()") is False
    async with application(shop, ANNA, autocommit=False) as app:
        with pytest.raises(errors.FeatureNotSupported, match="NOTIFY"):
            await prepare(app, ANNA)
        await app.rollback()
        await app.execute("SET LOCAL listener.notify = 'off'")
        await prepare(app, ANNA)
    await end(superuser, how="rollback")
    await superuser.execute("SELECT listener.set_notify('never')")
    assert await one(service, "SELECT listener.must_poll()") is True
    async with application(shop, ANNA, autocommit=False) as app:
        await prepare(app, ANNA)
    await end(superuser, how="commit")
    await superuser.execute("SELECT listener.set_notify(NULL)")
    assert await one(service, "SELECT listener.must_poll()") is True


async def test_a_service_that_heeds_the_new_mode_is_rung_for(shop: Database, superuser: AsyncConnection[Any]) -> None:
    async with shop.service(sweep_interval=3600.0) as running:
        await superuser.execute("SELECT listener.set_notify('always')")
        await running.service.drainer.heed_installation()
        assert running.service.drainer.doorbell.must_poll is False
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "rung for")
        await running.until_refreshed("sales", ANNA)


async def test_a_mode_that_does_not_exist_is_refused(superuser: AsyncConnection[Any]) -> None:
    with pytest.raises(psycopg.Error, match="not 'nonsense'") as raised:
        await superuser.execute("SELECT listener.set_notify('nonsense')")
    assert raised.value.sqlstate == "LSN02"
    assert await one(superuser, "SELECT notify FROM listener.installation") is None
