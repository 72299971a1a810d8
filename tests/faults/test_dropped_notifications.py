"""Notifications that are dropped while their connection lives: the probe finds it, or else the sweep does."""

from __future__ import annotations

import pytest

from backends import until_well
from books import ANNA, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import Database, eventually
from proxy import proxy_to

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def test_a_connection_on_which_no_notification_comes_is_replaced(books: Database) -> None:
    async with proxy_to(books.url()) as proxy:
        probing = {"listen_database_url": proxy.url, "probe_interval": "200ms", "probe_timeout": "1s"}
        async with books.service(sweep_interval="1h", **probing) as running:
            await settled(books, running)
            await eventually(lambda: running.service.listening.probe_answered)
            await eventually(lambda: running.service.drainer.doorbell.state == "resting")
            seen = len(running.outcomes)
            proxy.switch("unnotified")
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
            assert value(running, "listener_reconnects_total") == 1
            await until_well(books, running)
    assert await revenue(books) == 1


async def test_while_probes_come_and_nothing_else_the_sweep_brings_what_changed(books: Database) -> None:
    async with proxy_to(books.url()) as proxy:
        probing = {"listen_database_url": proxy.url, "probe_interval": "50ms"}
        async with books.service(sweep_interval="1s", **probing) as running:
            await settled(books, running)
            await eventually(lambda: running.service.listening.probe_answered)
            await eventually(lambda: running.service.drainer.doorbell.state == "resting")
            seen, before = len(running.outcomes), value(running, "listener_sweep_recovered_total")
            proxy.switch("probed")
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
            await eventually(lambda: value(running, "listener_sweep_recovered_total") > before)
            assert value(running, "listener_reconnects_total") == 0
            await until_well(books, running)
    assert await revenue(books) == 1
