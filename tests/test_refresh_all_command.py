"""`listener refresh --tenant ID --all-views`, and the time that each refresh took."""

from __future__ import annotations

import json
from typing import Any

import anyio
import psycopg
import pytest

from books import ANNA, BEN, LEDGER_VIEW, book, open_books, revenue, transaction
from command import listener
from conftest import DEADLINE, Database
from listener import operations, view_queries
from shop import one

pytestmark = pytest.mark.anyio

NOBODY = "99999999-9999-4999-8999-999999999999"


@pytest.fixture
async def books(sample: Database) -> Database:
    """Two tenants; one of them has a booking that no view shows."""
    await open_books(sample)
    assert listener("sweep", url=sample.url()).returncode == 0
    async with transaction(sample) as application:
        await book(application, ANNA, 100)
    return sample


def refresh(books: Database, *options: str) -> dict[str, Any]:
    ended = listener("refresh", *options, "--json", url=books.url())
    assert (ended.returncode, ended.stderr) == (0, "")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


async def test_every_view_of_a_tenant_is_refreshed_and_each_says_how_long_it_took(books: Database) -> None:
    found = refresh(books, "--tenant", str(ANNA).upper(), "--all-views")
    assert found["tenant_id"] == str(ANNA).upper()
    async with books.connect() as superuser:
        assert len(found["views"]) == await one(superuser, "SELECT count(*) FROM listener.managed_view")
    assert {row["outcome"] for row in found["views"]} == {"refreshed"}
    assert all(0 < row["seconds"] < 60 for row in found["views"])
    assert await revenue(books) == 1.0
    told = listener("refresh", "--tenant", str(ANNA), "--all-views", url=books.url())
    assert (told.returncode, told.stderr) == (0, "")
    (line,) = [line for line in told.stdout.splitlines() if line.startswith(LEDGER_VIEW)]
    assert line.split()[:5] == [LEDGER_VIEW, "refreshed", "0", "0", "0"]
    assert line.split()[-1] in {"ms", "s"}


async def test_a_paused_view_is_named_and_the_others_are_refreshed(books: Database) -> None:
    assert listener("pause", "mv_allocation_summary", url=books.url("listener_migrator")).returncode == 0
    ended = listener("refresh", "--tenant", str(ANNA), "--all-views", url=books.url())
    assert ended.returncode == 1
    assert ended.stderr == (
        "listener: mv_allocation_summary is paused: nothing was refreshed. Run: listener resume mv_allocation_summary\n"
    )
    assert await revenue(books) == 1.0


async def test_a_view_that_fails_is_named_in_one_line(books: Database) -> None:
    async with books.connect() as superuser:
        await superuser.execute(f"ALTER TABLE dashboard.{LEDGER_VIEW} ADD CHECK (total_revenue < 0) NOT VALID".encode())
    ended = listener("refresh", "--tenant", str(ANNA), "--all-views", url=books.url())
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith(f"listener: {LEDGER_VIEW}: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tenant", NOBODY, "--all-views"], f"no view has a tenant '{NOBODY}'."),
        (["--tenant", "", "--all-views"], "no view has a tenant ''."),
        (["--all-views"], "--all-views needs --tenant ID, and neither a view nor --all-tenants."),
        ([LEDGER_VIEW, "--tenant", NOBODY, "--all-views"], "--all-views needs --tenant ID"),
        (["--tenant", NOBODY], "the view is missing. Give one, or --all-views."),
    ],
)
async def test_what_is_missing_or_too_much_is_one_line(books: Database, arguments: list[str], says: str) -> None:
    ended = listener("refresh", *arguments, url=books.url())
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended
    assert says in ended.stderr


async def test_it_waits_for_a_session_that_is_at_one_of_the_views(
    books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = "SELECT pg_advisory_xact_lock(listener.lock_key(id, %s)) FROM listener.managed_view WHERE name = %s"
    asked: list[set[str]] = []
    tried = anyio.Event()
    ask = view_queries.refresh_all_for_tenant

    async def noting(connection: psycopg.AsyncConnection[Any], tenant: str) -> list[dict[str, Any]]:
        rows = await ask(connection, tenant)
        asked.append({row["outcome"] for row in rows})
        tried.set()
        return rows

    monkeypatch.setattr(view_queries, "refresh_all_for_tenant", noting)
    async with (
        books.connect() as other,
        books.connect("listener_service") as service,
        anyio.create_task_group() as tasks,
        other.transaction(),
    ):
        await other.execute(lock, (str(ANNA), LEDGER_VIEW))
        assert {"busy"} < {row["outcome"] for row in await operations.refresh_all_views(service, str(ANNA), 0)}
        tasks.start_soon(operations.refresh_all_views, service, str(ANNA))
        tried = anyio.Event()
        with anyio.fail_after(DEADLINE):
            await tried.wait()
    assert asked[1] == {"busy", "refreshed"}
    assert asked[-1] == {"refreshed"}
    assert await revenue(books) == 1.0


async def test_a_refresh_of_one_key_and_one_of_all_tenants_say_how_long_they_took(books: Database) -> None:
    one_key = refresh(books, LEDGER_VIEW, "--tenant", str(ANNA))
    assert 0 < one_key["seconds"] < 60
    told = listener("refresh", LEDGER_VIEW, "--tenant", str(BEN), url=books.url()).stdout
    assert ", took " in told
    assert told.rstrip().endswith((" ms", " s"))
    assert 0 < refresh(books, LEDGER_VIEW, "--all-tenants")["seconds"] < 60
