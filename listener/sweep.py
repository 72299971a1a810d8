"""Sweep: the fallback for what no notification brought, on every replica, with jitter; and upkeep."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import structlog

from listener import queries

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger("listener.sweep")


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What one round found: sources whose capture was mended, whether keys were marked, what could not be mended."""

    repaired: int = 0
    marked: bool = False
    troubles: list[str] = field(default_factory=list)


async def run(once: Callable[[], Awaitable[None]], interval: float) -> None:
    """Calls `once` every `interval` seconds, give or take a fifth, so that replicas do not sweep in step."""
    while True:
        await anyio.sleep(interval * random.uniform(0.8, 1.2))
        await once()


async def upkeep(connection: AsyncConnection[Any], letters_kept: float) -> Upkeep:
    """Mends capture, notices definitions that changed, deletes what is consumed. Raises psycopg.Error."""
    repaired = 0
    troubles = []
    for source, outcome, detail in await queries.repair_capture(connection):
        if outcome == "failed":
            troubles.append(f"capture of {source} is not as it should be, and could not be mended: {detail}")
        else:
            repaired += outcome == "repaired"
            what = (
                "capture was mended: every tenant is marked dirty" if outcome == "repaired" else "a source was renamed"
            )
            log.warning(what, source=source, now=detail)
    changed = await queries.changed_definitions(connection)
    for view, trouble in changed:
        if trouble is None:
            log.info("a definition changed: every tenant is marked dirty", view=view)
        else:
            troubles.append(f"the definition of {view} changed or is gone, and could not be taken over: {trouble}")
    for trouble in troubles:
        log.warning(trouble)
    await queries.purge(connection, letters_kept)
    return Upkeep(repaired, bool(repaired or changed), troubles)
