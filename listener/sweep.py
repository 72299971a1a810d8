"""Sweep: the fallback for what no notification brought, on every replica, with jitter."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
import structlog

from listener import queries

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger("listener.sweep")


async def run(once: Callable[[], Awaitable[None]], interval: float) -> None:
    """Calls `once` every `interval` seconds, give or take a fifth, so that replicas do not sweep in step."""
    while True:
        await anyio.sleep(interval * random.uniform(0.8, 1.2))
        await once()


async def housekeeping(connection: AsyncConnection[Any], letters_kept: float) -> list[str]:
    """Deletes what is consumed, notices definitions that changed; returns the views whose definition did."""
    await queries.purge(connection, letters_kept)
    changed = await queries.changed_definitions(connection)
    for view in changed:
        log.info("a definition changed: every tenant is marked dirty", view=view)
    return changed
