"""What whoever is on call does in the middle of a fault: asks why a key is stale, pauses, resumes, mends, verifies."""

from __future__ import annotations

from functools import partial
from typing import Any

from anyio import to_thread
from psycopg import AsyncConnection

from command import listener
from conftest import Database
from listener import operations, queries


async def explained(database: Database, view: str, tenant: str) -> str:
    """What `listener explain` prints; the service goes on meanwhile."""
    ended = await to_thread.run_sync(partial(listener, "explain", view, "--tenant", tenant, url=database.url()))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


async def pauses_and_resumes(database: Database, view: str, tenant: str) -> None:
    """Both commands do their work, and no fault makes them wait."""
    migrator = database.url("listener_migrator")
    for command, is_paused in (("pause", True), ("resume", False)):
        ended = await to_thread.run_sync(partial(listener, command, view, url=migrator))
        assert ended.returncode == 0, ended.stderr
        assert ("the view is paused" in await explained(database, view, tenant)) is is_paused


async def is_exact(database: Database, *views: str) -> bool:
    """Whether nothing is dirty, and each target equals its definition for every tenant."""
    async with database.connect() as superuser, database.connect("listener_service") as service:
        if not await queries.all_fresh(superuser):
            return False
        return [found async for _, _, found in operations.verify(service, list(views)) if found is not None] == []


async def open_letters(superuser: AsyncConnection[Any]) -> list[tuple[str, str, str]]:
    """View, tenant and SQLSTATE of each dead letter that is open."""
    cursor = await superuser.execute(
        "SELECT view_name, tenant, sqlstate FROM listener.dead_letter WHERE status = 'open' ORDER BY 1, 2"
    )
    return await cursor.fetchall()
