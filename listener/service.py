"""START HERE: the always-on service.

    listen ──ring──▶ drain ──changes──▶ Debouncer ──due──▶ workers: refresh ──▶ target
                       ▲                    ▲
                     sweep ──overdue keys───┘

Stages do not know each other; this file wires them. What survives a crash is in the database: the change log, the
dirty keys, the refresh state. The Debouncer is rebuilt from them, so the service can be killed at any moment.

The file is longer than the others so that the wiring is read in one place.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import anyio
import psycopg
import structlog
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from listener import changes, dead_letters, queries, startup, sweep, web
from listener.bell import Bell
from listener.debounce import Debouncer
from listener.errors import DATABASE_TROUBLE, SetupError, is_lost, reason
from listener.metrics import Metrics
from listener.notifications import ListenState, listen
from listener.refresh import Outcome, refresh
from listener.settings import Settings
from listener.views import Change

log = structlog.get_logger("listener.service")

BUSY_PAUSE = 0.05  # seconds
CONNECTION_PAUSE = 0.5
UNKNOWN_VIEW = "LSN01"


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
        self.drainer = changes.Drainer(self._connection, self._drained, settings.poll_interval.total_seconds())
        self.due = Bell()  # something may be due, or sooner than was known
        self.port = 0
        self._sweep_trouble: list[str] = []
        # The refreshes under way are shielded from shutdown until the grace period is over; their connections, where
        # they have one, can be told to cancel.
        self._under_way: dict[anyio.CancelScope, psycopg.AsyncConnection[Any] | None] = {}
        self._stop = anyio.Event()

    async def run(self) -> None:
        """Start-up, main loop, shutdown. Raises SetupError where it cannot start."""
        async with AsyncExitStack() as opened:
            await self.startup(opened)
            await self.main_loop()
        log.info("stopped")

    def stop(self) -> None:
        """Ends the main loop: the refreshes under way finish within the grace period, the rest stays dirty."""
        self._stop.set()

    async def startup(self, opened: AsyncExitStack) -> None:
        """Checks everything that can refuse a start, opens the HTTP socket and the pool, reads the state."""
        url = self.settings.database_url.get_secret_value()
        await startup.check(url, self.settings)
        self._socket: socket.socket = web.bind(self.settings.http_host, self.settings.http_port)
        opened.callback(self._socket.close)
        self.port = self._socket.getsockname()[1]
        self.pool = AsyncConnectionPool(**startup.pool_options(url, self.settings), open=False, name="listener")
        opened.push_async_callback(self._close_pool)
        await self.pool.open()
        try:
            await self.drainer.heed_installation()
            await self.drainer.take_over()
            async with self._connection() as connection:
                await self._look_after(connection)
                dirty = 0
                async with aclosing(changes.pending(connection, anyio.current_time(), overdue=False)) as pending:
                    async for change in pending:
                        self.debouncer.changed(change)
                        dirty += not change.aged
        except DATABASE_TROUBLE as error:
            raise SetupError(f"cannot read the state: {reason(error)}") from error
        log.info("serving", http=f"{self.settings.http_host}:{self.port}", dirty_keys=dirty)

    async def main_loop(self) -> None:
        """Runs all stages until told to stop; then lets the refreshes under way finish within the grace period."""
        settings = self.settings
        async with anyio.create_task_group() as outer:
            async with anyio.create_task_group() as stages:
                listen_url = settings.listen_database_url or settings.database_url

                async def listen_stage() -> None:
                    await listen(
                        listen_url.get_secret_value(),
                        self.drainer.bell.ring,
                        self.listening,
                        probe_interval=settings.probe_interval.total_seconds(),
                        probe_timeout=settings.probe_timeout.total_seconds(),
                    )

                stages.start_soon(listen_stage)
                stages.start_soon(self.drainer.run)
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
            with anyio.move_on_after(1):
                try:
                    await self.drainer.leave()
                except DATABASE_TROUBLE as error:
                    log.warning("the lease was not given up and runs out by itself", reason=reason(error))
            outer.cancel_scope.cancel()

    async def _close_pool(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.pool.close(timeout=1)

    @asynccontextmanager
    async def _connection(self, within: float = 10) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection of the pool, had within so many seconds. Raises PoolTimeout."""
        async with self.pool.connection(timeout=within) as connection:
            try:
                yield connection
            except psycopg.Error as error:
                if is_lost(error):
                    # The others have most likely gone the same way. Found out one by one, each would cost a backoff.
                    with anyio.CancelScope(shield=True):
                        await self.pool.drain()
                raise

    def _drained(self, drained: changes.Drained) -> None:
        self.metrics.changes_drained.inc(drained.changes)
        for change in drained.keys:
            self.debouncer.changed(change)
        self.due.ring()

    # -- refresh -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        # The cancellation finds nobody who waits while more is due.
        while not self._stop.is_set():
            now = anyio.current_time()
            change = self.debouncer.take(now)
            if change is None:
                due = self.debouncer.next_due()
                await self.due.wait(None if due is None else max(0.0, due - now))
                continue
            # Another worker may be asleep while more is due.
            self.due.ring()
            with anyio.CancelScope(shield=True) as scope:
                self._under_way[scope] = None
                try:
                    await self._refresh(change, scope)
                finally:
                    del self._under_way[scope]

    async def _refresh(self, change: Change, scope: anyio.CancelScope) -> None:
        retry_at: float | None = None
        try:
            async with self._connection() as connection:
                self._under_way[scope] = connection
                outcome = await self._refresh_on(connection, change)
            if outcome.outcome == "busy":
                retry_at = anyio.current_time() + BUSY_PAUSE
        except PoolTimeout:
            retry_at = anyio.current_time() + CONNECTION_PAUSE
        except psycopg.Error as error:
            self._under_way[scope] = None
            retry_at = await self._failed(change, error)
        finally:
            if retry_at is not None:
                self.debouncer.again(change, retry_at)
            self.due.ring()

    async def _refresh_on(self, connection: psycopg.AsyncConnection[Any], change: Change) -> Outcome:
        key = change.key
        started = anyio.current_time()
        outcome = await refresh(connection, key, change.version)
        ended = anyio.current_time()
        self.metrics.refreshes.labels(key.view, outcome.outcome).inc()
        if outcome.outcome == "busy":
            self.metrics.lock_busy.inc()
            return outcome
        # A paused view's keys stay dirty in the database; resume() logs them anew.
        self.debouncer.finished(key, outcome.version)
        if outcome.outcome == "expanded":
            self.drainer.bell.ring()
        if outcome.outcome == "refreshed":
            self.metrics.refresh_duration.labels(key.view).observe(ended - started)
            if not change.aged:
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
        if self._stop.is_set() or is_lost(error):
            return anyio.current_time() + CONNECTION_PAUSE
        self.metrics.refreshes.labels(key.view, "failed").inc()
        try:
            async with self._connection() as connection:
                failure = await dead_letters.record_failure(connection, change, error, self.policy)
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

    async def _enforce_grace(self) -> None:
        await anyio.sleep(self.settings.grace_period.total_seconds())
        log.warning("the grace period is over: refreshes are cancelled and stay dirty", refreshes=len(self._under_way))
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

    # -- sweep ---------------------------------------------------------------------------------------------------

    async def _sweep_once(self) -> None:
        try:
            rung = self.drainer.bell.is_rung
            drained = len((await self.drainer.look()).keys)
            missed = await self._take_overdue()
            recovered = 0 if rung or self.drainer.doorbell.state != "resting" else drained
            self.metrics.sweep_recovered.inc(recovered + missed)
            # Not sooner: what began during the sweep must still be known to it.
            self.debouncer.forget_starts(anyio.current_time())
            await self.drainer.heed_installation()
            async with self._connection() as connection:
                await self._look_after(connection)
        except DATABASE_TROUBLE as error:
            self._sweep_trouble = [f"the last sweep failed: {reason(error)}"]
            log.warning("sweep failed; the next one tries again", reason=reason(error))

    async def _take_overdue(self) -> int:
        """Hands overdue and aged keys that nobody attends to to the debouncer; how many of them were dirty."""
        missed = 0
        asked_at = anyio.current_time()
        running = self.debouncer.running_keys()
        async with (
            self._connection() as connection,
            aclosing(changes.pending(connection, anyio.current_time(), overdue=True)) as pending,
        ):
            async for change in pending:
                key = change.key
                # The answer is of the moment in which the question was asked. What was running then, or waited and
                # was taken since, may be refreshed by now.
                if key in self.debouncer or key in running or self.debouncer.started_since(key, asked_at):
                    # A window that was changed is taken over by the keys that wait.
                    if not change.aged:
                        self.debouncer.rewindow(key, change.window)
                    continue
                self.debouncer.changed(change)
                self.due.ring()
                missed += not change.aged
        return missed

    async def _look_after(self, connection: psycopg.AsyncConnection[Any]) -> None:
        done = await sweep.upkeep(connection, self.settings.letters_kept.total_seconds())
        self._sweep_trouble = done.troubles
        self.metrics.capture_repaired.inc(done.repaired)
        if done.marked:
            self.drainer.bell.ring()

    # -- web -----------------------------------------------------------------------------------------------------

    async def reasons_not_ready(self) -> list[str]:
        """One line for each thing that keeps the service from making progress."""
        reasons = []
        try:
            with anyio.fail_after(2):
                async with self._connection(within=2) as connection:
                    reasons += await queries.readiness(connection)
                    await queries.set_a_tenant(connection)
        except (TimeoutError, *DATABASE_TROUBLE) as error:
            reasons.append(f"the database cannot be asked: {reason(error)}")
        if not self.listening.connected:
            reasons.append(f"not listening: {self.listening.trouble or 'connecting'}")
        elif not self.listening.probe_answered:
            reasons.append("the first probe of the listening connection has not come back yet")
        patience = 3 * self.settings.sweep_interval.total_seconds() + 5
        looked_at = self.drainer.looked_at
        if self.drainer.trouble:
            reasons.append(f"not draining: {self.drainer.trouble}")
        elif looked_at is None:
            reasons.append("the first drain is not over yet")
        elif anyio.current_time() - looked_at > patience:
            reasons.append(
                f"draining makes no progress: the last look was {anyio.current_time() - looked_at:.0f} s ago"
            )
        return reasons + self._sweep_trouble

    async def _update_gauges(self) -> None:
        # Whoever scrapes /metrics need not ask /health/ready as well.
        self.metrics.not_ready_reasons.set(len(await self.reasons_not_ready()))
        try:
            with anyio.fail_after(2):
                async with self._connection(within=2) as connection:
                    rows = await queries.view_gauges(connection)
                    database = await queries.database_gauges(connection)
        except (TimeoutError, *DATABASE_TROUBLE):
            return  # the reasons say so; the last values stand
        self.metrics.show(rows)
        self.metrics.change_log_rows.set(database.change_log_rows)
        self.metrics.oldest_transaction_age.set(database.oldest_transaction_age)
        self.metrics.notification_queue_ratio.set(database.notification_queue_ratio)


async def _cancel(connection: psycopg.AsyncConnection[Any]) -> None:
    """Asks the server to cancel what the connection runs; a server that does not answer is not waited for."""
    with contextlib.suppress(psycopg.Error):
        await connection.cancel_safe(timeout=1)


async def _stop_on_signal(service: Service) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            service.stop()
