"""What whoever is on call does in the middle of a fault: asks why a key is stale, pauses, resumes, verifies.

As the commands do it, without a process for each.
"""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection

from conftest import Database
from listener import operations, view_queries
from listener.cli.session import known_key


async def explained(database: Database, view: str, tenant: object) -> list[str]:
    """The lines of `listener explain`; the first says stale or fresh."""
    async with database.connect("listener_service") as service:
        facts = await operations.explain(service, *await known_key(service, view, str(tenant)))
    reasons = operations.reasons(facts)
    return ["stale" if reasons else "fresh", *facts["troubles"], *reasons]


async def pauses_and_resumes(database: Database, view: str, tenant: object) -> None:
    """Both do their work, and no fault makes them wait."""
    async with database.connect("listener_migrator") as migrator:
        await migrator.execute("SET lock_timeout = '5s'")
        for command, is_paused in (("pause", True), ("resume", False)):
            await migrator.execute(f"SELECT listener.{command}(%s)".encode(), (view,))
            told = any("the view is paused" in line for line in await explained(database, view, tenant))
            assert told is is_paused


async def is_exact(database: Database, *views: str) -> bool:
    """Whether nothing is dirty, and each target equals its definition for every tenant."""
    async with database.connect() as superuser:
        return await view_queries.all_fresh(superuser) and await differences(database, *views) == []


async def differences(database: Database, *views: str) -> list[operations.Difference]:
    """Every key whose target does not equal its definition, of these views or of all."""
    async with database.connect("listener_service") as service:
        names = list(views) or [row["view"] for row in await view_queries.views(service)]
        return [found async for _, _, found in operations.verify(service, names) if found is not None]


async def open_letters(superuser: AsyncConnection[Any]) -> list[tuple[str, str, str]]:
    """View, tenant and SQLSTATE of each dead letter that is open."""
    cursor = await superuser.execute(
        "SELECT view_name, tenant, sqlstate FROM listener.dead_letter WHERE status = 'open' ORDER BY 1, 2"
    )
    return await cursor.fetchall()
