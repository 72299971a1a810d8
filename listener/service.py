"""START HERE: the always-on service.

    listen ──ring──▶ drain ──changes──▶ Debouncer ──due──▶ workers: refresh ──▶ target
                       ▲                    ▲
                     sweep ──overdue keys───┘

Stages do not know each other; this file wires them. What survives a crash is in the database: the change log, the
dirty keys, the refresh state. The Debouncer is rebuilt from them, so the service can be killed at any moment.

The file is longer than the others so that the wiring is read in one place.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import anyio
import psycopg
import structlog
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from listener import changes, dead_letters, queries, startup, sweep, web
from listener.backoff import Backoff
from listener.bell import Bell
from listener.debounce import Debouncer
from listener.errors import from_database
from listener.metrics import Metrics
from listener.notifications import ListenState, listen
from listener.refresh import Outcome, refresh
from listener.settings import Settings
from listener.views import EVERYBODY, Change

log = structlog.get_logger("listener.service")

# Seconds. A drain that found something is followed by another one no sooner, so that a stream of single writes is
# drained in small batches instead of one by one.
DRAIN_PAUSE = 0.005
BUSY_PAUSE = 0.05
CONNECTION_PAUSE = 0.5
UNKNOWN_VIEW = "LSN01"
# Lost connections are the service's trouble, not the key's.
LOST = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)


async def run(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT. Raises SetupError where it cannot start."""
    service = Service(settings)
    async with anyio.create_task_group() as signals:
        signals.start_soon(_stop_on_signal, service)
        await service.run()
        signals.cancel_scope.cancel()


class Service:
    """One replica. `on_outcome` is told of each refresh, after its commit."""

    def __init__(
        self, settings: Settings, on_outcome: Callable[[Change, Outcome], None] = lambda _change, _outcome: None
    ) -> None:
        self.settings = settings
        self.on_outcome = on_outcome
        self.started = anyio.Event()
        self.metrics = Metrics()
        self.debouncer = Debouncer()
        self.listening = ListenState(
            on_reconnect=self.metrics.reconnects.inc, on_malformed=self.metrics.malformed_notifications.inc
        )
        self.policy = dead_letters.RetryPolicy(
            settings.max_attempts, settings.retry_base, settings.retry_cap, settings.retry_quarantined
        )
        self.changed = Bell()  # something may be in the change log
        self.due = Bell()  # something may be due, or sooner than was known
        self.port = 0
        self._drain_lock = anyio.Lock()
        self._looked_at: float | None = None
        self._drain_trouble: str | None = None
        # The refreshes under way: shielded from shutdown until the grace period is over.
        self._under_way: dict[psycopg.AsyncConnection[Any], anyio.CancelScope] = {}
        self._stop = anyio.Event()

    async def run(self) -> None:
        """Start-up, main loop, shutdown. Raises SetupError where it cannot start."""
        await self.startup()
        try:
            await self.main_loop()
        finally:
            with anyio.CancelScope(shield=True):
                await self.shutdown()

    def stop(self) -> None:
        """Ends the main loop: the refreshes under way finish within the grace period, the rest stays dirty."""
        self._stop.set()

    async def startup(self) -> None:
        """Checks everything that can refuse a start, opens the pool and the HTTP socket, reads the state."""
        url = self.settings.database_url.get_secret_value()
        await startup.check(url, self.settings)
        self._socket: socket.socket = web.bind(self.settings.http_host, self.settings.http_port)
        self.port = self._socket.getsockname()[1]
        self.pool = AsyncConnectionPool(
            **startup.pool_options(url, self.settings), open=False, timeout=10, name="listener"
        )
        await self.pool.open()
        async with self.pool.connection() as connection:
            dirty, aged = await changes.pending(connection, anyio.current_time(), overdue=False)
        for change in dirty + aged:
            self.debouncer.changed(change)
        log.info("serving", http=f"{self.settings.http_host}:{self.port}", dirty_keys=len(dirty))

    async def main_loop(self) -> None:
        """Runs all stages until told to stop; then lets the refreshes under way finish within the grace period."""
        settings = self.settings
        async with anyio.create_task_group() as outer:
            async with anyio.create_task_group() as stages:
                listen_url = settings.listen_database_url or settings.database_url

                async def listen_stage() -> None:
                    await listen(
                        listen_url.get_secret_value(),
                        self.changed.ring,
                        self.listening,
                        probe_interval=settings.probe_interval.total_seconds(),
                        probe_timeout=settings.probe_timeout.total_seconds(),
                    )

                stages.start_soon(listen_stage)
                stages.start_soon(self._drain_loop)
                stages.start_soon(sweep.run, self._sweep_once, settings.sweep_interval.total_seconds())
                stages.start_soon(
                    web.serve,
                    web.application(self.metrics.registry, self.reasons_not_ready, self._update_gauges),
                    self._socket,
                )
                for _ in range(settings.workers):
                    stages.start_soon(self._work)
                self.started.set()
                await self._stop.wait()
                log.info("stopping", refreshes_under_way=len(self._under_way), waiting=len(self.debouncer))
                outer.start_soon(self._enforce_grace)
                stages.cancel_scope.cancel()
            outer.cancel_scope.cancel()

    async def shutdown(self) -> None:
        """Closes what startup opened."""
        self._socket.close()
        await self.pool.close(timeout=1)
        log.info("stopped")

    # -- drain ---------------------------------------------------------------------------------------------------

    async def _drain_loop(self) -> None:
        backoff = Backoff(base=0.1, cap=10)
        while True:
            await self.changed.wait()
            try:
                drained = await self._drain()
                backoff.reset()
            except LOST as error:
                delay = backoff.next_delay()
                self._drain_trouble = _reason(error)
                log.warning("not draining; trying again", reason=self._drain_trouble, retry_in=round(delay, 2))
                await anyio.sleep(delay)
                self.changed.ring()
                continue
            if drained.outcome == "busy":
                # Whoever drains now may have looked before the change that rang for us.
                await anyio.sleep(BUSY_PAUSE)
                self.changed.ring()
            else:
                await anyio.sleep(DRAIN_PAUSE)

    async def _drain(self) -> changes.Drained:
        async with self._drain_lock, self.pool.connection() as connection:
            now = anyio.current_time()
            drained = await changes.drain(connection, now, self._looked_at)
        self._drain_trouble = None
        if drained.outcome != "busy":
            self._looked_at = now
        if drained.outcome == "drained":
            self.metrics.changes_drained.inc(drained.changes)
            log.info(
                "drained",
                changes=drained.changes,
                keys=len(drained.keys),
                correlation_id=drained.correlation_id,
            )
            for change in drained.keys:
                self.debouncer.changed(change)
            self.due.ring()
        return drained

    # -- refresh -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            now = anyio.current_time()
            change = self.debouncer.take(now)
            if change is None:
                due = self.debouncer.next_due()
                await self.due.wait(None if due is None else max(0.0, due - now))
                continue
            # Another worker may be asleep while more is due.
            self.due.ring()
            with anyio.CancelScope(shield=True) as scope:
                await self._refresh(change, scope)

    async def _refresh(self, change: Change, scope: anyio.CancelScope) -> None:
        retry_at: float | None = None
        try:
            async with self.pool.connection() as connection:
                self._under_way[connection] = scope
                try:
                    outcome = await self._refresh_on(connection, change)
                finally:
                    del self._under_way[connection]
            if outcome is None or outcome.outcome == "busy":
                retry_at = anyio.current_time() + BUSY_PAUSE
        except psycopg.Error as error:
            retry_at = await self._failed(change, error)
        finally:
            if retry_at is not None:
                self.debouncer.again(change, retry_at)
            self.due.ring()

    async def _refresh_on(self, connection: psycopg.AsyncConnection[Any], change: Change) -> Outcome | None:
        key = change.key
        started = anyio.current_time()
        outcome = await refresh(connection, key, change.version)
        ended = anyio.current_time()
        self.metrics.refreshes.labels(key.view, outcome.outcome).inc()
        if outcome.outcome == "busy":
            self.metrics.lock_busy.inc()
            return outcome
        # A paused view's keys stay dirty in the database; resume() rings and the sweep finds them.
        self.debouncer.finished(key, outcome.version)
        if outcome.outcome == "expanded":
            self.changed.ring()
        if outcome.outcome == "refreshed":
            self.metrics.refresh_duration.labels(key.view).observe(ended - started)
            self.metrics.staleness.labels(key.view).observe(ended - change.first_change)
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
        self.on_outcome(change, outcome)
        return outcome

    async def _failed(self, change: Change, error: psycopg.Error) -> float | None:
        """Records the failure; when to try again, on the monotonic clock, or None when there is nothing left to try."""
        key = change.key
        if error.sqlstate == UNKNOWN_VIEW:
            self.debouncer.finished(key, change.version)
            log.info("the view was dropped", view=key.view)
            return None
        # Lost, or cancelled by our own shutdown: no fault of the key's.
        if self._stop.is_set() or error.sqlstate is None or error.sqlstate[:3] in {"080", "08P", "57P"}:
            return anyio.current_time() + CONNECTION_PAUSE
        self.metrics.refreshes.labels(key.view, "failed").inc()
        try:
            async with self.pool.connection() as connection:
                failure = await dead_letters.record_failure(connection, change, error, self.policy)
        except LOST as lost:
            log.warning("a failure could not be recorded", view=key.view, reason=_reason(lost))
            return anyio.current_time() + CONNECTION_PAUSE
        log.warning(
            "refresh failed" if failure.letter_id is None else "refresh failed; the key is quarantined",
            view=key.view,
            tenant_id=key.tenant,
            correlation_id=change.correlation_id,
            error=_reason(error),
            failures=failure.failures,
            retry_in=round(failure.retry_in, 2),
            dead_letter=failure.letter_id,
        )
        return anyio.current_time() + failure.retry_in

    async def _enforce_grace(self) -> None:
        await anyio.sleep(self.settings.grace_period.total_seconds())
        for connection in list(self._under_way):
            log.warning("the grace period is over: a refresh is cancelled and stays dirty")
            with anyio.move_on_after(1):
                await connection.cancel_safe(timeout=1)
        # A server that does not even answer a cancel: give the connection up.
        await anyio.sleep(1)
        for scope in list(self._under_way.values()):
            scope.cancel()

    # -- sweep ---------------------------------------------------------------------------------------------------

    async def _sweep_once(self) -> None:
        try:
            drained = await self._drain()
            recovered = 0 if self.changed.is_rung else len(drained.keys)
            async with self.pool.connection() as connection:
                dirty, aged = await changes.pending(connection, anyio.current_time(), overdue=True)
                missed = [change for change in dirty if change.key not in self.debouncer]
                for change in missed + [change for change in aged if change.key not in self.debouncer]:
                    self.debouncer.changed(change)
                if await sweep.housekeeping(connection, self.settings.letters_kept.total_seconds()):
                    self.changed.ring()
        except LOST as error:
            log.warning("sweep failed; the next one tries again", reason=_reason(error))
            return
        except psycopg.Error as error:
            log.warning("sweep failed", reason=_reason(error))
            return
        self.debouncer.forget_starts(anyio.current_time() - 600)
        self.metrics.sweep_recovered.inc(recovered + sum(c.key.tenant != EVERYBODY for c in missed))
        self.due.ring()

    # -- web -----------------------------------------------------------------------------------------------------

    async def reasons_not_ready(self) -> list[str]:
        """One line for each thing that keeps the service from making progress."""
        reasons = []
        try:
            with anyio.fail_after(2):
                async with self.pool.connection(timeout=2) as connection:
                    reasons += await queries.readiness(connection)
        except (TimeoutError, *LOST) as error:
            reasons.append(f"the database does not answer: {_reason(error)}")
        if not self.listening.connected:
            reasons.append(f"not listening: {self.listening.trouble or 'connecting'}")
        elif not self.listening.probe_answered:
            reasons.append("the first probe of the listening connection has not come back yet")
        patience = 3 * self.settings.sweep_interval.total_seconds() + 5
        if self._drain_trouble:
            reasons.append(f"not draining: {self._drain_trouble}")
        elif self._looked_at is None or anyio.current_time() - self._looked_at > patience:
            reasons.append("draining makes no progress: another session holds its lock")
        return reasons

    async def _update_gauges(self) -> None:
        try:
            with anyio.fail_after(2):
                async with self.pool.connection(timeout=2) as connection:
                    rows = await queries.view_gauges(connection)
        except (TimeoutError, *LOST):
            return  # /health/ready says why; the last values stand
        for row in rows:
            self.metrics.dirty_keys.labels(row["view"]).set(row["dirty_keys"])
            self.metrics.oldest_dirty_age.labels(row["view"]).set(row["oldest_dirty_age"])
            self.metrics.dead_letters.labels(row["view"]).set(row["dead_letters"])


def _reason(error: BaseException) -> str:
    if isinstance(error, psycopg.Error):
        return str(from_database(error))
    return str(error) or type(error).__name__


async def _stop_on_signal(service: Service) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            service.stop()
