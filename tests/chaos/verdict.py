"""What is looked at before and after: what the replicas hold, and whether everything is as it should be."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
from psycopg import AsyncConnection

from chaos.report import Held, Report
from chaos.world import World, until
from listener import operations, queries, view_queries

PATIENCE = 120.0
LASTING = 10.0  # seconds; a sweep of a replica that lives holds one for milliseconds


async def calm(world: World) -> None:
    """Until nothing is dirty any more; where that never comes the verdict says so."""
    with anyio.move_on_after(PATIENCE):
        async with world.superuser() as superuser:
            await until(partial(view_queries.all_fresh, superuser), 0.1)


async def counted(world: World) -> Held:
    """Of the first replica, which lives through everything, and of the database."""
    resources = world.replicas[0].resources()
    async with world.superuser() as superuser:
        connections = await _one(
            superuser, "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'listener%'"
        )
    return Held(resources.resident, resources.descriptors, int(connections))


async def verdict(world: World, report: Report) -> None:
    """Compares every target with its definition, and looks for what was left behind."""
    async with world.superuser() as superuser:
        names = [row["view"] for row in await view_queries.views(superuser)]
        async for done, _, difference in operations.verify(superuser, names):
            report.compared = done
            if difference is not None:
                report.troubles.append(f"{difference.verdict}: {difference}")
        if undrained := (await queries.undrained(superuser))[0]:
            report.troubles.append(f"{undrained} changes are not consumed")
        if locks := await _lasting_locks(superuser):
            report.troubles.append(f"the same {locks} advisory locks were held for {LASTING:g} s")
        if letters := await _one(superuser, "SELECT count(*) FROM listener.dead_letter WHERE status = 'open'"):
            report.troubles.append(f"{letters} dead letters are open")
        report.letters = await _one(superuser, "SELECT count(*) FROM listener.dead_letter")
    for replica in world.replicas:
        if not replica.is_running:
            report.troubles.append(f"{replica.name} has ended")
        lines = replica.log_lines()
        report.log_lines += len(lines)
        report.refreshes += len(replica.said("refreshed"))
        report.troubles += [f"{replica.name} says: {line!r}" for line in lines if not line.startswith(b"{")][:3]


async def _lasting_locks(connection: AsyncConnection[Any]) -> int:
    """How many advisory locks nobody gives back."""
    held: set[Any] | None = None
    deadline = anyio.current_time() + LASTING
    while held is None or (held and anyio.current_time() < deadline):
        found = await connection.execute(
            "SELECT pid, classid, objid, virtualtransaction FROM pg_locks WHERE locktype = 'advisory'"
        )
        now_held = set(await found.fetchall())
        held = now_held if held is None else held & now_held
        await anyio.sleep(0.05)
    return len(held)


async def _one(connection: AsyncConnection[Any], query: str) -> Any:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None
    return row[0]
