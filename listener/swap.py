"""A swap is tried, gives way behind a long reader, and is tried again: nobody waits in a queue meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from listener import operations
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
) -> Swapped:
    """Calls `finish` until it had its locks, for `patience` seconds; it returns how long readers were locked out.

    `view` is the one whose target is to be put in place. Raises SetupError once patience is over, and what `finish`
    raises otherwise: nothing was swapped then.
    """
    backoff = Backoff(base=0.1, cap=5)
    deadline = anyio.current_time() + patience
    while True:
        # A refresh that began before would find that its target has another name.
        await connection.execute("SELECT listener.pause(%s)", (view,))
        try:
            return Swapped(await finish(), backoff.attempts + 1)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            await connection.execute("SELECT listener.resume(%s)", (view,))
            if anyio.current_time() > deadline:
                raise SetupError(
                    f"no locks for the swap: {from_database(error)}", hint="Run it again: it goes on from here."
                ) from error
            delay = backoff.next_delay()
            tell(f"the swap gives way: {from_database(error)} Again in {delay:.1f} s")
            await anyio.sleep(delay)
        except psycopg.errors.ObjectNotInPrerequisiteState:
            # A tenant that was not there when the others were filled.
            await connection.execute("SELECT listener.resume(%s)", (view,))
            cursor = await connection.execute("SELECT t FROM listener.unfilled(%s) t", (view,))
            for (tenant,) in await cursor.fetchall():
                await operations.refresh_one(connection, view, tenant)
        except BaseException:
            # Whatever ended it, a view must not stay paused that dashboards read.
            with anyio.CancelScope(shield=True), suppress(psycopg.Error):
                await connection.execute("SELECT listener.resume(%s)", (view,))
            raise
