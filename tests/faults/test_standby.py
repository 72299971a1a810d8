"""A hot standby cannot be written to: it is waited for, at start and while running, and used once it is promoted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import quote

import anyio
import anyio.to_thread
import pytest
import structlog

from books import ANNA, LEDGER_VIEW, book, open_books, revenue, settled, transaction
from command import listener
from conftest import DEADLINE, Database, RunningService, eventually, server_of
from entrance import entrance_to
from lone_server import LoneServer, lone_server
from standby import PRIMARY, standby_of
from web_client import get, is_ready, reasons

pytestmark = pytest.mark.anyio
ONLY_READS = "is a standby, or read-only, and cannot be written to"


@pytest.fixture(scope="module")
def primary() -> Iterator[LoneServer]:
    with lone_server(**PRIMARY) as server:
        yield server


@asynccontextmanager
async def followed(primary: LoneServer) -> AsyncIterator[tuple[Database, Database]]:
    """A database of the primary's, and the same on a standby that has all of it."""
    books = primary.clone()
    await open_books(books)
    with standby_of(primary.embedded) as standby:
        yield books, Database(server_of(standby), books.name)


async def promote(database: Database) -> None:
    async with database.connect() as superuser:
        assert await (await superuser.execute("SELECT pg_promote()")).fetchone() == (True,)


async def run(*command: str, url: str) -> tuple[int, str, str]:
    done = await anyio.to_thread.run_sync(partial(listener, *command, url=url))
    return done.returncode, done.stdout, done.stderr


async def says(running: RunningService, what: str) -> bool:
    return what in await reasons(running)


async def test_a_standby_is_waited_for_and_served_once_it_is_promoted(primary: LoneServer) -> None:
    async with followed(primary) as (_, standby):
        with structlog.testing.capture_logs() as said:
            async with standby.starting() as running:
                await eventually(lambda: says(running, ONLY_READS))
                assert (await get(running, "/health")).json() == {"status": "alive"}
                assert [line["event"] for line in said] == ["waiting for the database"]

                # What only looks works meanwhile; what would write says why it does not.
                for looking in (("status",), ("explain", LEDGER_VIEW, "--tenant", str(ANNA))):
                    code, shown, complaint = await run(*looking, url=standby.url())
                    assert (code, complaint) == (0, "")
                    assert LEDGER_VIEW in shown
                for writing in ("pause", "resume"):
                    code, shown, complaint = await run(writing, LEDGER_VIEW, url=standby.url("listener_migrator"))
                    assert (code, shown) == (1, "")
                    assert "Is it a standby? Connect to the primary." in complaint.splitlines()[-1]
                    assert len(complaint.splitlines()) == 1

                await promote(standby)
                with anyio.fail_after(DEADLINE):
                    await running.service.started.wait()
                async with transaction(standby) as application:
                    await book(application, ANNA, 100)
                await running.until_refreshed(LEDGER_VIEW, ANNA)
                await settled(standby, running)
                await eventually(lambda: is_ready(running))
        assert await revenue(standby) == 1


async def test_a_service_whose_server_becomes_a_standby_waits_and_goes_on_with_whoever_can_be_written_to(
    primary: LoneServer,
) -> None:
    async with followed(primary) as (books, standby), entrance_to(books) as entrance:
        await entrance.switch("open")
        settings = {"database_url": entrance.url(), "sweep_interval": "500ms"}
        with structlog.testing.capture_logs() as said:
            async with books.starting(**settings) as running:
                with anyio.fail_after(DEADLINE):
                    await running.service.started.wait()
                await settled(books, running)
                seen = len(running.outcomes)

                entrance.lead_to(standby)
                await entrance.switch("open")
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                await eventually(lambda: says(running, "the server only reads"))
                assert (await get(running, "/health")).status_code == 200
                # The connections to the standby stand, and would stand for ever: the service must leave them.
                entrance.lead_to(books)
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
                await settled(books, running)
                await eventually(lambda: is_ready(running))

                async def has_followed() -> bool:
                    return await revenue(standby) == 1

                await eventually(has_followed)
                seen = len(running.outcomes)
                entrance.lead_to(standby)
                await entrance.switch("open")
                await eventually(lambda: says(running, "the server only reads"))
                await promote(standby)
                async with transaction(standby) as application:
                    await book(application, ANNA, 200)
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
                await settled(standby, running)
                await eventually(lambda: is_ready(running))
        assert await revenue(standby) == 3
    complaints = [line for line in said if line["log_level"] == "warning"]
    assert len(complaints) < 60, complaints


async def test_a_url_of_several_hosts_follows_the_primary(primary: LoneServer) -> None:
    async with followed(primary) as (books, standby):
        hosts = quote(f"{standby.directory},{books.directory}", safe="")
        url = f"postgresql://listener_service@/{books.name}?host={hosts}&port=5432&target_session_attrs=read-write"
        try:
            async with books.starting(database_url=url, sweep_interval="500ms") as running:
                with anyio.fail_after(DEADLINE):
                    await running.service.started.wait()
                await settled(books, running)
                await eventually(lambda: is_ready(running))
                seen = len(running.outcomes)
                await anyio.to_thread.run_sync(primary.embedded._end, "immediate")
                await promote(standby)
                async with transaction(standby) as application:
                    await book(application, ANNA, 100)
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
                await settled(standby, running)
                await eventually(lambda: is_ready(running))
            assert await revenue(standby) == 1
        finally:
            await anyio.to_thread.run_sync(primary.embedded._launch)
