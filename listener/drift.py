"""Drift: compares a few keys a minute with their definition, in the background, and has what differs refreshed.

All keys come round, in the order of their index, each replica from a random one on. What it costs is bounded: so many
keys a minute, none whose refresh is slow, none for longer than a timeout, and a share of the time between two sweeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import structlog

from listener import view_queries
from listener.errors import is_lost, reason
from listener.metrics import Metrics

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger("listener.drift")

# Seconds. A comparison takes about as long as a refresh did; the timeout is for those that take longer than it looked.
SLOWEST_REFRESH = 1.0
TIMEOUT = 5.0
SHARE = 0.2  # of the time between two sweeps: no comparison begins after that


class Rounds:
    """Where one replica is in its rounds. `per_minute`: keys; 0: none is ever compared."""

    def __init__(self, per_minute: int, between: float, metrics: Metrics) -> None:
        self._per_second = per_minute / 60
        self._most = float(per_minute)
        self._budget = between * SHARE
        self._metrics = metrics
        self._after: tuple[int | None, str] = (None, "")
        self._last: float | None = None
        self._due = 0.0

    async def go_on(self, connection: AsyncConnection[Any]) -> bool:
        """Compares the keys whose turn has come since the last call; whether one was marked. Raises psycopg.Error."""
        now = anyio.current_time()
        if self._last is not None:
            # What was not got through is not made up for.
            self._due = min(self._due + (now - self._last) * self._per_second, self._most)
        self._last = now
        wanted = int(self._due)
        if not wanted:
            return False
        self._due -= wanted
        marked = False
        for view_id, view, tenant in await self._next(connection, wanted):
            if anyio.current_time() > now + self._budget:
                break
            self._after = (view_id, tenant)
            marked |= await self._compare(connection, view, tenant)
        return marked

    async def _next(self, connection: AsyncConnection[Any], wanted: int) -> list[tuple[int, str, str]]:
        keys = await view_queries.next_keys(connection, *self._after, wanted, SLOWEST_REFRESH)
        if not keys:
            # The end of a round, or nothing is refreshed yet.
            self._after = (0, "")
            keys = await view_queries.next_keys(connection, *self._after, wanted, SLOWEST_REFRESH)
        return keys

    async def _compare(self, connection: AsyncConnection[Any], view: str, tenant: str) -> bool:
        try:
            found = await view_queries.check_drift(connection, view, tenant, TIMEOUT)
        except psycopg.Error as error:
            if connection.broken or connection.closed or is_lost(error):
                raise
            # A definition that raises fails its refresh as well, and is told there.
            log.info("a key could not be compared", view=view, tenant_id=tenant, error=reason(error))
            self._metrics.verified.labels("failed").inc()
            return False
        self._metrics.verified.labels(found["outcome"]).inc()
        if found["outcome"] == "undetermined" and found["example"] is not None:
            log.warning(
                "a definition has more than one right result: computed again, it came out differently",
                view=view,
                tenant_id=tenant,
                example=found["example"],
                fix="listener doctor says what to change in the query",
            )
        if found["outcome"] != "drift":
            return False
        self._metrics.drift.labels(view).inc()
        log.warning(
            "a target differs from its definition, and no change explains it: the key is refreshed",
            view=view,
            tenant_id=tenant,
            missing=found["missing"],
            extra=found["extra"],
            example=found["example"],
            app_correlation_id=found["app_correlation_id"],
        )
        return True
