"""Workers: each takes the key that is due, refreshes it, and records what failed; all of them know when to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import psycopg
import structlog
from psycopg_pool import PoolTimeout

from listener import dead_letters
from listener.bell import Bell
from listener.debounce import Debouncer
from listener.errors import DATABASE_TROUBLE, READ_ONLY, RELEASE_TOO_OLD, UNKNOWN_VIEW, is_lost, reason
from listener.metrics import Metrics
from listener.refresh import Outcome, refresh
from listener.views import Change

log = structlog.get_logger("listener.workers")

BUSY_PAUSE = 0.05  # seconds
CONNECTION_PAUSE = 0.1
# A standby is not promoted within moments, and each attempt costs a connection.
STANDBY_PAUSE = 5.0
TOO_OLD_PAUSE = 5.0


class Workers:
    """The refreshes of one replica. `on_outcome` is told of each, after its commit."""

    def __init__(
        self,
        connection: Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]],
        debouncer: Debouncer,
        metrics: Metrics,
        policy: dead_letters.RetryPolicy,
        on_outcome: Callable[[Change, Outcome], None],
    ) -> None:
        self.due = Bell()  # something may be due, or sooner than was known
        self._connection = connection
        self._debouncer = debouncer
        self._metrics = metrics
        self._policy = policy
        self._on_outcome = on_outcome
        # The refreshes under way are shielded from shutdown until the grace period is over; their connections, where
        # they have one, can be told to cancel.
        self._under_way: dict[anyio.CancelScope, psycopg.AsyncConnection[Any] | None] = {}
        self._stopping = False

    @property
    def under_way(self) -> int:
        """Refreshes that have begun and not ended."""
        return len(self._under_way)

    def stop(self) -> None:
        """No refresh begins from now on. Those under way go on, and cancelling a worker does not reach them."""
        self._stopping = True

    async def work(self) -> None:
        """One worker, until cancelled or told to stop."""
        # The cancellation finds nobody who waits while more is due.
        while not self._stopping:
            now = anyio.current_time()
            change = self._debouncer.take(now)
            if change is None:
                due = self._debouncer.next_due()
                await self.due.wait(None if due is None else max(0.0, due - now))
                continue
            # Another worker may be asleep while more is due.
            self.due.ring()
            with anyio.CancelScope(shield=True) as scope:
                self._under_way[scope] = None
                try:
                    await self._attempt(change, scope)
                finally:
                    del self._under_way[scope]

    async def give_up(self) -> None:
        """Cancels what is under way: at the server where it answers, else by leaving the connections. Once stopped."""
        with anyio.move_on_after(1):
            async with anyio.create_task_group() as cancelling:
                for connection in self._under_way.values():
                    if connection is not None:
                        cancelling.start_soon(_cancel, connection)
                # Those that were cancelled say so, and their workers end.
                await anyio.sleep_forever()
        # A server that does not even answer a cancel: give the connections up.
        for scope in list(self._under_way):
            scope.cancel()

    async def _attempt(self, change: Change, scope: anyio.CancelScope) -> None:
        # What is cancelled, wherever it was, waits again: its key must not be taken for running ever after.
        retry_at: float | None = anyio.current_time() + CONNECTION_PAUSE
        try:
            async with self._connection() as connection:
                self._under_way[scope] = connection
                outcome = await self._refresh(connection, change)
            retry_at = anyio.current_time() + BUSY_PAUSE if outcome.outcome == "busy" else None
        except PoolTimeout:
            retry_at = anyio.current_time() + CONNECTION_PAUSE
        except psycopg.Error as error:
            self._under_way[scope] = None
            retry_at = await self._failed(change, error)
        finally:
            if retry_at is not None:
                self._debouncer.again(change, retry_at)
            self.due.ring()

    async def _refresh(self, connection: psycopg.AsyncConnection[Any], change: Change) -> Outcome:
        key = change.key
        started = anyio.current_time()
        outcome = await refresh(connection, change)
        ended = anyio.current_time()
        self._metrics.refreshes.labels(key.view, outcome.outcome).inc()
        if outcome.outcome == "busy":
            self._metrics.lock_busy.inc()
            return outcome
        # A paused view's keys stay dirty in the database; resume() logs them anew.
        self._debouncer.finished(key, outcome.version)
        if outcome.outcome == "refreshed":
            self._metrics.refresh_duration.labels(key.view).observe(ended - started)
            if not change.aged:
                self._metrics.staleness.labels(key.view).observe(ended - change.first_change)
        log.info(
            outcome.outcome,
            view=key.view,
            tenant_id=key.tenant,
            correlation_id=change.correlation_id,
            app_correlation_id=change.app_correlation_id,
            inserted=outcome.inserted,
            updated=outcome.updated,
            deleted=outcome.deleted,
            seconds=round(ended - started, 4),
        )
        self._on_outcome(change, outcome)
        return outcome

    async def _failed(self, change: Change, error: psycopg.Error) -> float | None:
        """Records the failure; when to try again, on the monotonic clock, or None when there is nothing left to try."""
        key = change.key
        if error.sqlstate == UNKNOWN_VIEW:
            self._debouncer.finished(key, change.version)
            log.info("the view was dropped", view=key.view)
            return None
        # Lost, or cancelled by our own shutdown: no fault of the key's.
        if self._stopping or is_lost(error):
            return anyio.current_time() + (STANDBY_PAUSE if error.sqlstate == READ_ONLY else CONNECTION_PAUSE)
        # The schema was migrated under us; the drain says so, and whoever replaces us refreshes the key.
        if error.sqlstate == RELEASE_TOO_OLD:
            return anyio.current_time() + TOO_OLD_PAUSE
        self._metrics.refreshes.labels(key.view, "failed").inc()
        try:
            async with self._connection() as connection:
                failure = await dead_letters.record_failure(connection, change, error, self._policy)
        except DATABASE_TROUBLE as trouble:
            log.warning("a failure could not be recorded", view=key.view, reason=reason(trouble))
            return anyio.current_time() + CONNECTION_PAUSE
        log.warning(
            "refresh failed" if failure.letter_id is None else "refresh failed; the key is quarantined",
            view=key.view,
            tenant_id=key.tenant,
            correlation_id=change.correlation_id,
            app_correlation_id=change.app_correlation_id,
            error=reason(error),
            failures=failure.failures,
            retry_in=round(failure.retry_in, 2),
            dead_letter=failure.letter_id,
        )
        return anyio.current_time() + failure.retry_in


async def _cancel(connection: psycopg.AsyncConnection[Any]) -> None:
    """Asks the server to cancel what the connection runs; a server that does not answer is not waited for."""
    with contextlib.suppress(psycopg.Error):
        await connection.cancel_safe(timeout=1)
