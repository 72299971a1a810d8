"""Connections that stand and carry nothing, in one direction or both: found, given up, replaced; nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import anyio
import pytest
from pydantic import SecretStr

from backends import DRAIN, POOL, REFRESH, backends, caught, drained_all, locked, log_many_changes, until_well
from books import ANNA, LEDGER_VIEW, book, open_books, revenue, settled, transaction, value
from command import listener
from conftest import Database, RunningService, eventually
from listener.silence import PatientConnection
from proxy import Mode, Proxy, proxy_to
from web_client import is_ready

pytestmark = pytest.mark.anyio

# The probe alone finds it out: no sweep comes to its help, and no timeout of the server's.
PROBING = {"sweep_interval": "1h", "probe_interval": "200ms", "probe_timeout": "1s"}


class Lines:
    """A service whose connections go through two proxies: `listening`'s and `pool`'s."""

    def __init__(self, running: RunningService, listening: Proxy, pool: Proxy) -> None:
        self.running, self.listening, self.pool = running, listening, pool

    @property
    def given_up(self) -> float:
        return value(self.running, "listener_connections_given_up_total")

    @property
    def reconnects(self) -> float:
        return value(self.running, "listener_reconnects_total")


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


@pytest.fixture
async def lines(books: Database) -> AsyncIterator[Lines]:
    """All is shown and probed, and the service polls no more: it needs its notifications."""
    async with AsyncExitStack() as opened:
        listening = await opened.enter_async_context(proxy_to(books.url()))
        pool = await opened.enter_async_context(proxy_to(books.url()))
        running = await opened.enter_async_context(
            books.service(
                database_url=SecretStr(pool.url), listen_database_url=SecretStr(listening.url), workers=2, **PROBING
            )
        )
        await settled(books, running)
        await eventually(lambda: running.service.listening.probe_answered)
        await eventually(lambda: running.service.drainer.doorbell.state == "resting")
        yield Lines(running, listening, pool)


async def booked(books: Database, lines: Lines) -> None:
    """One more row is shown."""
    seen, before = len(lines.running.outcomes), await revenue(books)
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    await lines.running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert await revenue(books) == (before or 0) + 1


@pytest.mark.parametrize("mode", ["deaf", "mute", "hole", "stuck"])
async def test_a_listening_connection_in_a_black_hole_is_replaced(books: Database, lines: Lines, mode: Mode) -> None:
    lines.listening.switch(mode)
    # Nothing but the probe can find it out, and nothing but the new connection can bring the change.
    await booked(books, lines)
    await eventually(lambda: lines.reconnects == 1)
    await until_well(books, lines.running)


@pytest.mark.parametrize("mode", ["deaf", "mute", "hole"])
async def test_idle_connections_of_the_pool_in_a_black_hole_are_replaced(
    books: Database, lines: Lines, mode: Mode
) -> None:
    async with books.connect() as superuser:
        before = await backends(superuser, POOL)
        lines.pool.switch(mode)
        await booked(books, lines)
        assert lines.given_up > 0
        assert lines.reconnects == 0

        async def one_is_gone() -> bool:
            return bool(before - await backends(superuser, POOL))

        # Ended at the server, whom their clients' end may not have reached.
        await eventually(one_is_gone)
    await until_well(books, lines.running)


@pytest.mark.parametrize("mode", ["deaf", "stuck"])
async def test_a_refresh_is_given_up_once_it_is_over_and_its_answer_lost_and_not_before(
    books: Database, lines: Lines, mode: Mode
) -> None:
    service = lines.running.service
    async with books.connect() as superuser, locked(books, "dashboard", "mv_realtime_revenue") as release:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        refreshing = await caught(superuser, REFRESH)
        lines.pool.switch(mode)

        def connection() -> PatientConnection:
            (found,) = (c for c in service.in_use._connections if c.info.backend_pid == refreshing)
            return found

        def has_been_silent() -> bool:
            since = connection().silent_since
            return since is not None and anyio.current_time() - since > service.settings.probe_timeout.total_seconds()

        await eventually(has_been_silent)
        async with books.connect("listener_service") as asking:
            await service.in_use.judge(asking)
        # It is silent for long enough, but at work.
        assert has_been_silent()
        seen = len(lines.running.outcomes)
        await release()
        await lines.running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert lines.given_up > 0
    assert await revenue(books) == 1
    await until_well(books, lines.running)


async def test_the_keys_of_a_drain_whose_answer_was_lost_are_known_to_the_next(books: Database, lines: Lines) -> None:
    seen = len(lines.running.outcomes)
    async with books.connect() as superuser, locked(books, "listener", "dirty_key") as release:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await caught(superuser, DRAIN)
        lines.pool.switch("deaf")
        await release()
    # It was committed: no other drain finds the change, and no sweep comes for an hour.
    await lines.running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    await until_well(books, lines.running)
    assert await revenue(books) == 1


async def test_a_drain_of_very_many_keys_over_a_stuck_link_keeps_no_lock(books: Database, lines: Lines) -> None:
    async with books.connect() as superuser, locked(books, "listener", "dirty_key") as release:
        await log_many_changes(books, 4000)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        stuck = await caught(superuser, DRAIN)
        lines.pool.switch("stuck")
        await release()
        await eventually(lambda: drained_all(superuser))

        async def is_gone() -> bool:
            return stuck not in await backends(superuser, POOL)

        await eventually(is_gone)
    assert lines.given_up > 0


async def test_listening_and_pool_in_a_black_hole_at_once_are_replaced(books: Database, lines: Lines) -> None:
    seen = len(lines.running.outcomes)
    async with books.connect() as superuser, locked(books, "dashboard", "mv_realtime_revenue") as release:
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await caught(superuser, REFRESH)
        lines.listening.switch("hole")
        lines.pool.switch("hole")
        await release()
    await lines.running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    assert lines.reconnects == 1
    assert await revenue(books) == 1
    await until_well(books, lines.running)


async def test_idle_connections_are_replaced_when_the_listening_one_is_lost(books: Database, lines: Lines) -> None:
    lines.listening.switch("hole")
    lines.pool.switch("hole")
    await booked(books, lines)
    # Nobody had to wait for one of them first.
    assert (lines.reconnects, lines.given_up) == (1, 0)
    await until_well(books, lines.running)


async def test_what_is_accepted_and_stays_silent_says_so_and_keeps_nothing_from_coming_back(
    books: Database, lines: Lines
) -> None:
    service = lines.running.service
    for line in (lines.listening, lines.pool):
        line.switch("hole", later="hole")
    async with transaction(books) as application:
        await book(application, ANNA, 100)

    async def says_so() -> bool:
        reasons = "\n".join(await service.reasons_not_ready())
        return "the database cannot be asked: " in reasons and "not listening: " in reasons

    await eventually(says_so)

    async def command(*arguments: str, user: str = "listener_service") -> str:
        done = await anyio.to_thread.run_sync(lambda: listener(*arguments, url=books.url(user)))
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Over a connection of their own the commands work as ever.
    assert "not drained yet" in await command("explain", LEDGER_VIEW, "--tenant", str(ANNA))
    await command("pause", LEDGER_VIEW, user="listener_migrator")
    assert "is paused" in await command("explain", LEDGER_VIEW, "--tenant", str(ANNA))
    await command("resume", LEDGER_VIEW, user="listener_migrator")

    seen = len(lines.running.outcomes)
    # What was opened meanwhile stays silent: its first message was lost.
    for line in (lines.listening, lines.pool):
        line.switch("hole", later="forward")
    await lines.running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
    await eventually(lambda: is_ready(lines.running))
    await until_well(books, lines.running)


@pytest.mark.parametrize("during", ["a refresh", "nothing"])
async def test_connections_that_are_reset_are_replaced(books: Database, during: str) -> None:
    async with (
        proxy_to(books.url()) as proxy,
        books.service(database_url=SecretStr(proxy.tcp_url), sweep_interval="1h") as running,
    ):
        await settled(books, running)
        await eventually(lambda: running.service.listening.probe_answered)
        seen = len(running.outcomes)
        async with books.connect() as superuser, locked(books, "dashboard", "mv_realtime_revenue"):
            if during == "a refresh":
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                await caught(superuser, REFRESH)
            proxy.switch("reset")
        if during == "nothing":
            async with transaction(books) as application:
                await book(application, ANNA, 100)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await eventually(lambda: value(running, "listener_reconnects_total") > 0)
        await until_well(books, running)


async def test_behind_a_pooler_the_services_own_patience_ends_a_wait(books: Database) -> None:
    async with proxy_to(books.url()) as proxy:
        proxy.switch("pooled", later="pooled")
        settings = PROBING | {"statement_timeout": "2s", "listen_database_url": books.url()}
        async with books.service(database_url=SecretStr(proxy.url), **settings) as running:
            await settled(books, running)
            seen = len(running.outcomes)
            proxy.switch("deaf", later="pooled")
            async with transaction(books) as application:
                await book(application, ANNA, 100)
            await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
            # The server knows no backend of the pid that the connection was told.
            assert value(running, "listener_connections_given_up_total") == 0
            await until_well(books, running)
