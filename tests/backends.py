"""The service's backends: found, killed, frozen, held in mid-statement by a lock; and that all is well afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from psycopg import AsyncConnection, sql

from books import settled
from conftest import Database, RunningService, eventually
from on_call import differences

LISTENING, POOL = "listener listen", "listener"
REFRESH, DRAIN = r"%listener.refresh\_dirty(%", "%listener.drain()%"


async def backends(superuser: AsyncConnection[Any], application_name: str) -> set[int]:
    """The pids of this database's sessions of that name."""
    cursor = await superuser.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
        (application_name,),
    )
    return {pid for (pid,) in await cursor.fetchall()}


async def kill(superuser: AsyncConnection[Any], *pids: int) -> None:
    """As an operator would."""
    await superuser.execute("SELECT pg_terminate_backend(p) FROM unnest(%s::int[]) p", (list(pids),))


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Their processes are stopped, as on a machine that hangs; they go on at the end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def locked(database: Database, *table: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Whoever writes to the table waits, until the block ends or calls what it is given."""
    async with database.connect(autocommit=False) as holder:
        await holder.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(*table)))
        yield holder.rollback


async def caught(superuser: AsyncConnection[Any], statement: str) -> int:
    """The pid of a backend of the service, once it waits for such a lock in a statement like this."""
    found: list[tuple[int]] = []

    async def waits() -> bool:
        cursor = await superuser.execute(
            """
            SELECT pid FROM pg_stat_activity WHERE application_name = 'listener' AND datname = current_database()
                AND wait_event_type = 'Lock' AND query LIKE %s
            """,
            (statement,),
        )
        found[:] = await cursor.fetchall()
        return bool(found)

    await eventually(waits)
    return found[0][0]


async def log_many_changes(database: Database, number: int) -> None:
    """So many tenants changed; the views are paused, so that each is drained and none refreshed. Nobody is rung for."""
    async with database.connect("listener_migrator") as migrator, database.connect() as superuser:
        await migrator.execute("SELECT listener.pause()")
        await superuser.execute(
            """
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
            SELECT pg_current_xact_id(), clock_timestamp(), s.id, gen_random_uuid()::text
            FROM listener.source s, generate_series(1, %s) WHERE s.table_name = 'revenue_ledger'
            """,
            (number,),
        )


async def drained_all(superuser: AsyncConnection[Any]) -> bool:
    """Whether no change is logged that no drain has seen."""
    return (await superuser.execute("SELECT FROM listener.unconsumed()")).rowcount == 0


async def until_well(database: Database, running: RunningService) -> None:
    """Until all is shown; then every target is as defined, nobody holds a lock, and no key has failed."""
    await settled(database, running)
    async with database.connect() as superuser:

        async def nobody_holds_a_lock() -> bool:
            cursor = await superuser.execute(
                "SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
                " WHERE l.locktype = 'advisory' AND d.datname = current_database()"
            )
            return cursor.rowcount == 0

        await eventually(nobody_holds_a_lock)
        assert await differences(database) == []
        assert await (await superuser.execute("SELECT * FROM listener.dead_letter")).fetchall() == []
