"""Links that are slow: what arrives within the deadline, or goes on arriving, is no silence."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from backends import DRAIN, POOL, backends, caught, drained_all, locked, log_many_changes, until_well
from books import ANNA, LEDGER_VIEW, book, open_books, settled, transaction, value
from conftest import Database, eventually
from proxy import proxy_to

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


@pytest.mark.parametrize("slow", ["every connection", "the pool"])
async def test_answers_that_come_late_but_come_raise_no_alarm(books: Database, slow: str) -> None:
    async with proxy_to(books.url()) as proxy:
        # An answer takes many times as long as the time between two probes, and no probe as long as it may.
        probing = {"probe_interval": "10ms", "probe_timeout": "5s", "sweep_interval": "1h"}
        listening = books.url() if slow == "the pool" else proxy.url
        links = {"database_url": SecretStr(proxy.url), "listen_database_url": SecretStr(listening)}
        async with books.service(**probing, **links) as running:
            await settled(books, running)
            proxy.link.rate = 2000
            for _ in range(2):
                seen = len(running.outcomes)
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
            assert value(running, "listener_reconnects_total") == 0
            assert value(running, "listener_connections_given_up_total") == 0
            await until_well(books, running)


async def test_an_answer_that_takes_longer_than_a_probe_may_is_heard_to_its_end(books: Database) -> None:
    async with proxy_to(books.url()) as proxy:
        probing = {"probe_interval": "50ms", "probe_timeout": "500ms", "sweep_interval": "1h"}
        direct = {"listen_database_url": books.url()}
        async with books.service(database_url=SecretStr(proxy.url), **probing, **direct) as running:
            await settled(books, running)
            before = value(running, "listener_changes_drained_total")
            async with books.connect() as superuser, locked(books, "listener", "dirty_key") as release:
                await log_many_changes(books, 200)
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                draining = await caught(superuser, DRAIN)
                # Two views, 200 bytes a row: several times 500 ms.
                proxy.link.rate = 50_000
                await release()
                await eventually(lambda: value(running, "listener_changes_drained_total") >= before + 200)
                assert await drained_all(superuser)
                assert draining in await backends(superuser, POOL)
            assert value(running, "listener_connections_given_up_total") == 0
