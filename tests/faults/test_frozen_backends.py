"""Backends that are frozen by SIGSTOP: the server says that they are at work, as it says of slow ones."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest

from backends import DRAIN, LISTENING, REFRESH, backends, caught, frozen, kill, locked, until_well
from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from conftest import Database, eventually
from listener import operations
from web_client import is_ready

pytestmark = pytest.mark.anyio

# A statement may hear nothing for two seconds.
BRISK = {"sweep_interval": "100ms", "probe_interval": "200ms", "probe_timeout": "1s", "statement_timeout": "1s"}


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def test_a_frozen_listening_backend_is_replaced(books: Database) -> None:
    async with books.connect() as superuser, books.service(**BRISK | {"sweep_interval": "1h"}) as running:
        await settled(books, running)
        await eventually(lambda: running.service.listening.probe_answered)
        # While it polls, it needs no notification.
        await eventually(lambda: running.service.drainer.doorbell.state == "resting")
        seen = len(running.outcomes)
        with frozen(*await backends(superuser, LISTENING)):
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)


async def reasons_why(superuser: psycopg.AsyncConnection[Any]) -> str:
    """What `listener explain` says of the key."""
    return "\n".join(operations.reasons(await operations.explain(superuser, LEDGER_VIEW, str(ANNA))))


@pytest.mark.parametrize("end", ["continued", "killed"])
async def test_a_frozen_refresh_is_given_up_and_done_once_its_backend_is_continued_or_killed(
    books: Database, end: str
) -> None:
    async with books.connect() as superuser, books.service(**BRISK) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with locked(books, "dashboard", "mv_realtime_revenue") as release:
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            stuck = await caught(superuser, REFRESH)
            with frozen(stuck):
                await release()
                # All other keys go on.
                await running.until_refreshed("mv_daily_revenue_summary", ANNA, after=seen)
                async with transaction(books, BEN) as application:
                    await book(application, BEN, 100)
                await running.until_refreshed(LEDGER_VIEW, BEN, after=seen)
                assert f"backend {stuck} holds the key's lock" in await reasons_why(superuser)
                # Given up, its worker finds the key busy, as anybody would.
                await eventually(lambda: value(running, "listener_lock_busy_total") > 0)
                assert stuck not in {c.info.backend_pid for c in running.service.in_use._connections}
                if end == "killed":
                    await kill(superuser, stuck)
                assert await revenue(books) is None
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await until_well(books, running)
    assert await revenue(books) == 1


@pytest.mark.parametrize("end", ["continued", "killed"])
async def test_a_frozen_drain_is_named_by_readiness_and_all_is_well_once_it_is_continued_or_killed(
    books: Database, end: str
) -> None:
    async with books.connect() as superuser, books.service(**BRISK) as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with locked(books, "listener", "dirty_key") as release:
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            stuck = await caught(superuser, DRAIN)
            with frozen(stuck):
                await release()
                named = re.compile(
                    rf"draining makes no progress: .*backend {stuck} has held the drain's lock for \d+ s"
                )

                async def says_so() -> bool:
                    return any(named.search(why) for why in await running.service.reasons_not_ready())

                await eventually(says_so)
                assert f"backend {stuck} holds the drain's lock" in await reasons_why(superuser)
                if end == "killed":
                    await kill(superuser, stuck)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await eventually(lambda: is_ready(running))
        await until_well(books, running)
    assert await revenue(books) == 1
