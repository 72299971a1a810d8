"""START HERE: the always-on service.

    listen ──ring──▶ drain ──changes──▶ Debouncer ──due──▶ workers: refresh ──▶ target
                       ▲                    ▲
                     sweep ──overdue keys───┘

Stages do not know each other; this file wires them. What survives a crash is in the database: the change log, the
dirty keys, the refresh state. The Debouncer is rebuilt from them, so the service can be killed at any moment.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import anyio
import psycopg
import structlog
from psycopg_pool import AsyncConnectionPool

from listener import changes, dead_letters, queries, startup, sweep, web
from listener.debounce import Debouncer
from listener.errors import DATABASE_TROUBLE, SetupError, is_lost, reason
from listener.metrics import Metrics
from listener.notifications import ListenState, listen
from listener.refresh import Outcome
from listener.settings import Settings
from listener.views import Change
from listener.workers import Workers

log = structlog.get_logger("listener.service")


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
        self.started = anyio.Event()
        self.metrics = Metrics()
        self.debouncer = Debouncer()
        self.listening = ListenState(
            on_reconnect=self.metrics.reconnects.inc, on_malformed=self.metrics.malformed_notifications.inc
        )
        self.drainer = changes.Drainer(self._connection, self._drained, settings.poll_interval.total_seconds())
        policy = dead_letters.RetryPolicy(
            settings.max_attempts, settings.retry_base, settings.retry_cap, settings.retry_quarantined
        )

        def refreshed(change: Change, outcome: Outcome) -> None:
            if outcome.outcome == "expanded":
                self.drainer.bell.ring()
            on_outcome(change, outcome)

        self.workers = Workers(self._connection, self.debouncer, self.metrics, policy, refreshed)
        self.port = 0
        self._sweep_trouble: list[str] = []
        self._stop = anyio.Event()

    async def run(self) -> None:
        """Start-up, main loop, shutdown. Raises SetupError where it cannot start."""
        async with AsyncExitStack() as opened:
            await self.startup(opened)
            await self.main_loop()
        log.info("stopped")

    def stop(self) -> None:
        """Ends the main loop: the refreshes under way finish within the grace period, the rest stays dirty."""
        self.workers.stop()
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
                    stages.start_soon(self.workers.work)
                self.started.set()
                await self._stop.wait()
                log.info("stopping", refreshes_under_way=self.workers.under_way, waiting=len(self.debouncer))
                outer.start_soon(self._after_grace)
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
        connection = await self.pool.getconn(timeout=within)
        try:
            yield connection
        except psycopg.Error as error:
            if is_lost(error):
                # The others have most likely gone the same way. Found out one by one, each would cost a backoff.
                with anyio.CancelScope(shield=True):
                    await self.pool.drain()
            raise
        finally:
            # Cancelled while it is given back, it would be lost, and its place in the pool with it.
            with anyio.CancelScope(shield=True):
                await self.pool.putconn(connection)

    def _drained(self, drained: changes.Drained) -> None:
        self.metrics.changes_drained.inc(drained.changes)
        for change in drained.keys:
            self.debouncer.changed(change)
        self.workers.due.ring()

    async def _after_grace(self) -> None:
        await anyio.sleep(self.settings.grace_period.total_seconds())
        log.warning(
            "the grace period is over: refreshes are cancelled and stay dirty", refreshes=self.workers.under_way
        )
        await self.workers.give_up()

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
                        self.workers.due.ring()
                    continue
                self.debouncer.changed(change)
                self.workers.due.ring()
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


async def _stop_on_signal(service: Service) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            service.stop()
