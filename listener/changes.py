"""Drain: change_log -> dirty keys, by listener.drain(); the loop that does it; and the dirty keys already known."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, LiteralString, NamedTuple, TypeVar

import anyio
import structlog
from psycopg import sql
from psycopg.rows import args_row

from listener import queries
from listener.backoff import Backoff
from listener.bell import Bell
from listener.doorbell import SHORTEST_PAUSE, Doorbell
from listener.errors import DATABASE_TROUBLE, public_reason, reason
from listener.views import Change, RefreshKey, Window

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger("listener.changes")
BUSY_PAUSE = 0.05  # seconds
# So many keys of a drain are named in its log line.
NAMED_KEYS = 20
# Keys received at once: no more than a socket takes in, or a server whose client stopped reading would sit in the
# middle of its answer for ever. Between two of them idle_in_transaction_session_timeout watches over it.
PAGE = 100

Value = TypeVar("Value")


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
    """Drains whenever it is rung for, and by itself while the doorbell says so.

    `on_drained` is told what a drain brought; `on_unheard` is called after one whose answer was lost, keys and all.
    """

    def __init__(
        self,
        connection: Callable[[], AbstractAsyncContextManager[AsyncConnection[Any]]],
        on_drained: Callable[[Drained], None],
        on_unheard: Callable[[], Awaitable[object]],
        poll_interval: float,
    ) -> None:
        self.bell = Bell()  # something may be in the change log
        self.doorbell = Doorbell(poll_interval)
        self.looked_at: float | None = None  # when the last drain that saw everything began
        self.trouble: str | None = None  # why the last one failed, for anybody to see
        self._connection = connection
        self._on_drained = on_drained
        self._on_unheard = on_unheard
        self._unheard = False  # a drain may have been committed whose answer did not come: its keys are not known
        self._lock = anyio.Lock()
        self._backoff = Backoff(base=0.05, cap=1)

    async def run(self) -> None:
        """Until cancelled. Whatever the database says is waited out."""
        while True:
            await self.bell.wait(self.doorbell.next_look(anyio.current_time()))
            try:
                outcome = (await self.look()).outcome
            except DATABASE_TROUBLE as error:
                delay = self._backoff.next_delay()
                self.trouble = public_reason(error)
                log.warning("not draining; trying again", reason=reason(error), retry_in=round(delay, 2))
                await anyio.sleep(delay)
                self.bell.ring()
                continue
            if outcome == "busy":
                # Whoever drains now may have looked before the change that rang for us.
                await anyio.sleep(BUSY_PAUSE)
                self.bell.ring()
            else:
                # A stream of single writes is drained in small batches instead of one by one.
                await anyio.sleep(SHORTEST_PAUSE)

    async def look(self) -> Drained:
        """One drain, and what follows from it for the doorbell. Raises psycopg.Error."""
        async with self._lock:
            unheard, self._unheard = self._unheard, True
            drained = await self._look()
            # The lock that is busy may be held by that very drain.
            if drained.outcome != "busy":
                if unheard:
                    await self._on_unheard()
                unheard = False
            self._unheard = unheard
        return drained

    async def _look(self) -> Drained:
        async with self._connection() as connection:
            began = anyio.current_time()
            past = self.doorbell.mark is not None and await queries.is_past(connection, self.doorbell.mark)
            started = anyio.current_time()
            drained = await drain(connection, started, self.looked_at)
            self.trouble = None
            self._backoff.reset()
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
            close = (self.doorbell.must_poll and not must_poll) or await queries.lease_is_wrong(connection)
            changed = close or must_poll != self.doorbell.must_poll
            if close:
                # Whoever wrote until now did not ring.
                await self._close(connection)
            self.doorbell.must_poll = must_poll
        if changed:
            self.bell.ring()

    async def take_over(self) -> None:
        """At start: ends the lease that whoever ran before may have left, and looks until all who saw it have ended.

        Another replica that polls takes its lease again. Raises psycopg.Error.
        """
        async with self._lock, self._connection() as connection:
            await self._close(connection)

    async def leave(self) -> None:
        """At the end: gives the lease up, and has the other replicas look for what was written under it."""
        if self.doorbell.state != "resting":
            async with self._connection() as connection:
                await queries.end_lease(connection)
                await queries.ring_for_all(connection)

    async def _close(self, connection: AsyncConnection[Any]) -> None:
        await queries.end_lease(connection)
        self.doorbell.ended(await queries.take_mark(connection), anyio.current_time())


async def drain(connection: AsyncConnection[Any], now: float, looked_before: float | None = None) -> Drained:
    """Folds what is new into the dirty keys and returns those.

    `now`: the monotonic clock, in seconds. `looked_before`: when the last drain that saw everything began; what it
    could not see was not visible then, so no change of a tenant's own is older than that.
    """
    reader = _Reader(now, looked_before)
    async with connection.cursor(row_factory=args_row(_Row)) as cursor:
        await cursor.execute("SELECT * FROM listener.drain()")
        rows = await cursor.fetchall()
    first = rows[0]
    if first.outcome != "drained":
        return Drained(first.outcome, restored=bool(first.restored))
    keys = [reader.change(row) for row in rows if row.view_id is not None and not row.paused]
    if first.view_id is None and first.keys:
        # Very many, and only now that the drain has committed: whoever else drains waits for none of this.
        async with aclosing(_paged(connection, "SELECT * FROM listener.drained_keys(%s)", first.version)) as found:
            keys = [reader.change(row) async for row in found if not row.paused]
    return Drained("drained", first.changes, first.correlation_id, keys, bool(first.restored))


async def pending(connection: AsyncConnection[Any], now: float, *, overdue: bool) -> AsyncGenerator[Change]:
    """The dirty keys in the database, all of them or the overdue ones; then the clean keys past their max_age.

    They come page by page, and the connection is busy until the last one came, or this is closed.
    """
    reader = _Reader(now, None)
    async with aclosing(_paged(connection, "SELECT * FROM listener.pending_keys(%s)", overdue)) as rows:
        async for row in rows:
            yield reader.change(row)


class _Row(NamedTuple):
    """The columns of drain() and its like, in their order. Those of the key are NULL where there is none."""

    outcome: Any
    drained_at: Any
    changes: int
    keys: int | None
    correlation_id: str
    app_correlation_id: str | None
    view_id: Any
    view_name: str
    tenant: str
    version: int | None
    first_change_age: float
    last_change_age: float
    refresh_started_age: float | None
    retry_in: float | None
    quiet_period: float
    max_wait: float
    edge: Literal["leading", "trailing"]
    bulk: bool
    paused: bool
    restored: bool | None = None


async def _paged(connection: AsyncConnection[Any], query: LiteralString, *parameters: object) -> AsyncGenerator[_Row]:
    """The rows, of which there may be very many, through a cursor of the server: a page at a time is in memory."""
    page = sql.SQL("FETCH {} FROM pending_keys").format(PAGE)
    async with connection.transaction(), connection.cursor(row_factory=args_row(_Row)) as cursor:
        await cursor.execute("DECLARE pending_keys NO SCROLL CURSOR FOR " + query, parameters)
        while True:
            # What it returns depends on the cursor: not to be prepared.
            await cursor.execute(page, prepare=False)
            rows = await cursor.fetchall()
            for row in rows:
                yield row
            if len(rows) < PAGE:
                return


class _Reader:
    """Rows -> changes. What is equal in many of them is kept once: a hundred thousand may be waiting."""

    def __init__(self, now: float, looked_before: float | None) -> None:
        self._now = now
        self._looked_before = looked_before
        self._windows: dict[tuple[float, float, str], Window] = {}
        self._values: dict[Any, Any] = {}

    def change(self, row: _Row) -> Change:
        """The change that the row tells of."""
        now = self._now
        first_change = now - row.first_change_age
        last_change = now - row.last_change_age
        if self._looked_before is not None and not row.bulk:
            first_change = max(first_change, self._looked_before)
            last_change = max(last_change, first_change)
        return Change(
            key=RefreshKey(row.view_id, self._once(row.view_name), row.tenant),
            window=self._window(row),
            version=self._once(row.version or 0),
            first_change=first_change,
            last_change=first_change if last_change == first_change else last_change,
            correlation_id=self._once(row.correlation_id),
            app_correlation_id=self._once(row.app_correlation_id),
            refresh_started=None if row.refresh_started_age is None else now - row.refresh_started_age,
            retry_at=None if row.retry_in is None or row.retry_in <= 0 else now + row.retry_in,
            bulk=row.bulk,
            aged=row.outcome == "aged",
        )

    def _window(self, row: _Row) -> Window:
        values = (row.quiet_period, row.max_wait, row.edge)
        window = self._windows.get(values)
        if window is None:
            window = self._windows[values] = Window(*values)
        return window

    def _once(self, value: Value) -> Value:
        known: Value = self._values.setdefault(value, value)
        return known
