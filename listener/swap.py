"""A swap is tried, gives way behind a long reader, and is tried again: nobody waits in a queue meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString

import anyio
import psycopg
from psycopg import sql

from listener import operations, view_queries
from listener.backoff import Backoff
from listener.errors import SetupError, from_database

if TYPE_CHECKING:
    from psycopg import AsyncConnection

Tell = Callable[[str], None]
PATIENCE = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class Swapped:
    """Seconds that readers were locked out, and how often it was tried."""

    locked: float
    attempts: int


async def swapped(
    connection: AsyncConnection[Any],
    view: str,
    finish: Callable[[], Awaitable[float]],
    tell: Tell,
    patience: float = PATIENCE,
    *,
    is_read: bool = False,
) -> Swapped:
    """Calls `finish` until it had its locks, for `patience` seconds; it returns how long readers were locked out.

    `view` is paused meanwhile, since a refresh that began before would find that its target has another name; not so
    one that dashboards read (`is_read`), which would stay paused where this process is killed. Raises SetupError once
    patience is over, and what `finish` raises otherwise: nothing was swapped then.
    """

    async def switch(step: LiteralString) -> None:
        if not is_read:
            await connection.execute(sql.SQL("SELECT listener.{}(%s)").format(sql.Identifier(step)), (view,))

    backoff = Backoff(base=0.1, cap=5)
    deadline = anyio.current_time() + patience
    while True:
        await switch("pause")
        try:
            return Swapped(await finish(), backoff.attempts + 1)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            await switch("resume")
            if anyio.current_time() > deadline:
                raise SetupError(
                    f"no locks for the swap: {from_database(error)}", hint="Run it again: it goes on from here."
                ) from error
            delay = backoff.next_delay()
            tell(f"the swap gives way: {from_database(error)} Again in {delay:.1f} s")
            await anyio.sleep(delay)
        except psycopg.errors.ObjectNotInPrerequisiteState:
            # A tenant that was not there when the others were filled.
            await switch("resume")
            for tenant in await view_queries.unfilled(connection, view):
                await operations.refresh_one(connection, view, tenant)
        except BaseException:
            with anyio.CancelScope(shield=True), suppress(psycopg.Error):
                await switch("resume")
            raise
