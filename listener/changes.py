"""Drain: change_log -> dirty keys, by listener.drain(); the loop that does it; and the dirty keys already known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio
import structlog
from psycopg.rows import DictRow, dict_row

from listener import queries
from listener.backoff import Backoff
from listener.bell import Bell
from listener.doorbell import SHORTEST_PAUSE, Doorbell
from listener.errors import DATABASE_TROUBLE, reason
from listener.views import Change, RefreshKey, Window

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger("listener.changes")
BUSY_PAUSE = 0.05  # seconds
# So many keys of a drain are named in its log line.
NAMED_KEYS = 20


@dataclass(frozen=True, slots=True)
class Drained:
    """What one drain brought. `busy` is not `nothing`: another session is draining, and may have looked too early.

    `restored`: the database is a copy, or was restored, since the drain before.
    """

    outcome: Literal["drained", "nothing", "busy"]
    changes: int = 0
    correlation_id: str | None = None
    keys: list[Change] = field(default_factory=list)
    restored: bool = False


class Drainer:
    """Drains whenever it is rung for, and by itself while the doorbell says so."""

    def __init__(
        self,
        connection: Callable[[], AbstractAsyncContextManager[AsyncConnection[Any]]],
        on_drained: Callable[[Drained], None],
        poll_interval: float,
    ) -> None:
        self.bell = Bell()  # something may be in the change log
        self.doorbell = Doorbell(poll_interval)
        self.looked_at: float | None = None  # when the last drain that saw everything began
        self.trouble: str | None = None
        self._connection = connection
        self._on_drained = on_drained
        self._lock = anyio.Lock()

    async def run(self) -> None:
        """Until cancelled. Whatever the database says is waited out."""
        backoff = Backoff(base=0.1, cap=10)
        while True:
            await self.bell.wait(self.doorbell.next_look(anyio.current_time()))
            try:
                outcome = (await self.look()).outcome
            except DATABASE_TROUBLE as error:
                delay = backoff.next_delay()
                self.trouble = reason(error)
                log.warning("not draining; trying again", reason=self.trouble, retry_in=round(delay, 2))
                await anyio.sleep(delay)
                self.bell.ring()
                continue
            backoff.reset()
            if outcome == "busy":
                # Whoever drains now may have looked before the change that rang for us.
                await anyio.sleep(BUSY_PAUSE)
                self.bell.ring()
            else:
                # A stream of single writes is drained in small batches instead of one by one.
                await anyio.sleep(SHORTEST_PAUSE)

    async def look(self) -> Drained:
        """One drain, and what follows from it for the doorbell. Raises psycopg.Error."""
        async with self._lock, self._connection() as connection:
            began = anyio.current_time()
            past = self.doorbell.mark is not None and await queries.is_past(connection, self.doorbell.mark)
            started = anyio.current_time()
            drained = await drain(connection, started, self.looked_at)
            self.trouble = None
            if drained.outcome == "busy":
                return drained
            self.looked_at = began
            self._tell(drained)
            if past:
                self.doorbell.closed()
            now = anyio.current_time()
            deed = self.doorbell.drained(now, found=drained.outcome == "drained", took=now - started)
            if deed == "hold":
                # Before it is taken: the lease would stand unwatched if the answer were lost. A writer that finds none
                # rings.
                self.doorbell.held(now)
                await queries.hold_lease(connection)
            elif deed == "end":
                await self._close(connection)
        return drained

    def _tell(self, drained: Drained) -> None:
        if drained.restored:
            log.warning("this database is a copy or was restored: every tenant of every view is marked dirty")
        if drained.outcome == "drained":
            log.info(
                "drained",
                changes=drained.changes,
                keys=len(drained.keys),
                correlation_id=drained.correlation_id,
                named=[f"{change.key.view}/{change.key.tenant}" for change in drained.keys[:NAMED_KEYS]],
            )
            self._on_drained(drained)

    async def heed_installation(self) -> None:
        """Finds out whether capture may notify here, which an operator can change. Raises psycopg.Error."""
        async with self._lock, self._connection() as connection:
            must_poll = await queries.must_poll(connection)
            if (self.doorbell.must_poll and not must_poll) or await queries.lease_is_wrong(connection):
                # Whoever wrote until now did not ring.
                await self._close(connection)
            self.doorbell.must_poll = must_poll
        self.bell.ring()

    async def _close(self, connection: AsyncConnection[Any]) -> None:
        await queries.end_lease(connection)
        self.doorbell.ended(await queries.take_mark(connection), anyio.current_time())


async def drain(connection: AsyncConnection[Any], now: float, looked_before: float | None = None) -> Drained:
    """Folds what is new into the dirty keys and returns those.

    `now`: the monotonic clock, in seconds. `looked_before`: when the last drain that saw everything began; what it
    could not see was not visible then, so no change of a tenant's own is older than that.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.drain()")
        rows = await cursor.fetchall()
    first = rows[0]
    if first["outcome"] != "drained":
        return Drained(first["outcome"], restored=bool(first["restored"]))
    keys = [_change(row, now, looked_before) for row in rows if row["view_id"] is not None and not row["paused"]]
    return Drained("drained", first["changes"], first["correlation_id"], keys, bool(first["restored"]))


async def pending(connection: AsyncConnection[Any], now: float, *, overdue: bool) -> tuple[list[Change], list[Change]]:
    """The dirty keys in the database, all of them or the overdue ones; and the clean keys past their max_age."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("SELECT * FROM listener.pending_keys(%s)", (overdue,))
        dirty: list[Change] = []
        aged: list[Change] = []
        async for row in cursor:
            (aged if row["outcome"] == "aged" else dirty).append(_change(row, now, None))
        return dirty, aged


def _change(row: DictRow, now: float, looked_before: float | None) -> Change:
    first_change = now - row["first_change_age"]
    last_change = now - row["last_change_age"]
    if looked_before is not None and not row["bulk"]:
        first_change = max(first_change, looked_before)
        last_change = max(last_change, first_change)
    return Change(
        key=RefreshKey(row["view_id"], row["view_name"], row["tenant"]),
        window=Window(row["quiet_period"], row["max_wait"], row["edge"]),
        version=row["version"] or 0,
        first_change=first_change,
        last_change=last_change,
        correlation_id=row["correlation_id"],
        app_correlation_id=row["app_correlation_id"],
        refresh_started=None if row["refresh_started_age"] is None else now - row["refresh_started_age"],
        retry_at=None if row["retry_in"] is None or row["retry_in"] <= 0 else now + row["retry_in"],
        bulk=row["bulk"],
        aged=row["outcome"] == "aged",
    )
