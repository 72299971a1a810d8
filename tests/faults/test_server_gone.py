"""The server cannot be reached, at start and while running: alive, not ready with the reason, and back by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import anyio
import anyio.to_thread
import pytest
import structlog

from books import ANNA, LEDGER_VIEW, book, open_books, revenue, settled, transaction
from command import listener
from conftest import DEADLINE, Database, RunningService, eventually, settings_for
from entrance import Entrance, Mode, entrance_to
from listener import connections
from listener.backoff import Backoff
from listener.errors import SetupError
from listener.service import Service
from lone_server import LoneServer, lone_server
from on_call import differences
from web_client import get, is_ready, reasons

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def lone() -> Iterator[LoneServer]:
    with lone_server() as server:
        yield server


@pytest.fixture
async def books(sample: Database) -> Database:
    await open_books(sample)
    return sample


async def is_alive_and_not_ready(running: RunningService, *wanted: str) -> None:
    """Once these are among the reasons."""

    async def says_so() -> bool:
        given = await reasons(running)
        return all(reason in given for reason in wanted)

    await eventually(says_so)
    assert (await get(running, "/health")).json() == {"status": "alive"}


async def commands_say_so(entrance: Entrance) -> None:
    """What asks the database says in one line that it does not answer, and fails."""
    asked = (
        ("status",),
        ("explain", LEDGER_VIEW, "--tenant", str(ANNA)),
        ("pause", LEDGER_VIEW),
        ("resume", LEDGER_VIEW),
    )
    for command in asked:
        done = await anyio.to_thread.run_sync(partial(listener, *command, url=entrance.url()))
        assert done.returncode == 1, command
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert "the database does not answer" in line


@pytest.mark.parametrize("mode", ["refused", "silent", "full"])
async def test_a_server_that_cannot_be_reached_is_waited_for_and_lost_and_found_again(
    books: Database, mode: Mode
) -> None:
    async with entrance_to(books) as entrance:
        await entrance.switch(mode)
        settings = {"database_url": entrance.url(), "sweep_interval": "1s", "probe_timeout": "2s"}
        with structlog.testing.capture_logs() as said:
            async with books.starting(**settings) as running:
                await is_alive_and_not_ready(running, "the database does not answer")
                assert "\nlistener_not_ready_reasons 1.0\n" in (await get(running, "/metrics")).text
                assert [line["event"] for line in said] == ["waiting for the database"]
                await entrance.switch("open")
                with anyio.fail_after(DEADLINE):
                    await running.service.started.wait()
                await settled(books, running)
                await eventually(lambda: is_ready(running))

                seen = len(running.outcomes)
                await entrance.switch(mode)
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                await is_alive_and_not_ready(running, "the database cannot be asked", "not listening")
                await entrance.switch("open")
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
                await eventually(lambda: is_ready(running))
    assert await revenue(books) == 1
    assert await differences(books) == []


async def test_commands_say_in_one_line_that_the_server_is_gone(books: Database) -> None:
    async with entrance_to(books) as entrance:
        await commands_say_so(entrance)


def test_pauses_double_up_to_a_cap_and_no_two_replicas_pause_alike() -> None:
    one, other = Backoff(base=1, cap=4), Backoff(base=1, cap=4)
    pauses = [(one.next_delay(), other.next_delay()) for _ in range(6)]
    for wanted, given in zip((1, 2, 4, 4, 4, 4), pauses, strict=True):
        assert all(0.75 * wanted <= pause <= 1.25 * wanted for pause in given)
    assert any(a != b for a, b in pauses)


async def test_attempts_to_start_are_backed_off_with_jitter_and_the_same_reason_is_logged_once(
    books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LONGEST_PAUSE", 0.8)
    async with entrance_to(books) as entrance:
        await entrance.switch("closing")
        with structlog.testing.capture_logs() as said:
            async with books.starting(database_url=entrance.url()) as running:
                await eventually(lambda: len(entrance.attempts) >= 6)
                running.service.stop()
    first, *pauses = [later - at for at, later in zip(entrance.attempts, entrance.attempts[1:], strict=False)]
    # Doubled once, from half a second, and then capped; a quarter less with luck.
    assert first >= 0.75 * 0.5
    assert min(pauses) >= 0.75 * 0.8
    assert [line["event"] for line in said] == ["waiting for the database", "stopped"]


@pytest.mark.parametrize(
    ("user", "database", "says_so"),
    [("nobody_of_this_name", None, "role"), ("listener_service", "nothing_of_this_name", "database")],
)
async def test_what_no_waiting_mends_refuses_the_start(
    books: Database, user: str, database: str | None, says_so: str
) -> None:
    url = books.server.url(user, database or books.name)
    with anyio.fail_after(DEADLINE), pytest.raises(SetupError, match=f'refuses the connection: .*{says_so} ".*exist'):
        await Service(settings_for(url)).run()


async def test_a_stopped_server_is_waited_for_and_what_was_under_way_is_not_lost(lone: LoneServer) -> None:
    books = lone.clone()
    await open_books(books)
    async with books.service(sweep_interval="1s") as running:
        await settled(books, running)
        seen = len(running.outcomes)
        async with transaction(books) as application:
            await book(application, ANNA, 100)
        await anyio.to_thread.run_sync(lone.embedded._end, "immediate")
        await is_alive_and_not_ready(running, "the database cannot be asked", "not listening")
        await anyio.to_thread.run_sync(lone.embedded._launch)
        async with transaction(books) as application:
            await book(application, ANNA, 200)
        await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
        await settled(books, running)
        await eventually(lambda: is_ready(running))
    assert await revenue(books) == 3
    assert await differences(books) == []


async def test_a_server_that_crashes_again_and_again_under_load_loses_nothing(lone: LoneServer) -> None:
    books = lone.clone()
    await open_books(books)
    booked = 0
    crashes = 5
    with structlog.testing.capture_logs() as said:
        async with books.service(sweep_interval="1s") as running:
            await settled(books, running)
            for _ in range(crashes):
                seen = len(running.outcomes)
                for _ in range(20):
                    async with transaction(books) as application:
                        await book(application, ANNA, 100)
                    booked += 1
                # Not before it works again: each crash finds a service in the middle of its work.
                await running.until_refreshed(LEDGER_VIEW, ANNA, after=seen)
                async with transaction(books) as application:
                    await book(application, ANNA, 100)
                booked += 1
                await anyio.to_thread.run_sync(lone.embedded.restart, "immediate")
            await settled(books, running)
            await eventually(lambda: is_ready(running))
    assert await revenue(books) == booked
    assert await differences(books) == []
    async with books.connect() as superuser:
        assert await (await superuser.execute("SELECT * FROM listener.dead_letter")).fetchall() == []
    complaints = [line for line in said if line["log_level"] in {"warning", "error"}]
    assert len(complaints) <= 12 * crashes, complaints
