"""START HERE: the always-on service.

    listen ──ring──▶ drain ──changes──▶ Debouncer ──due──▶ workers: refresh ──▶ target
                       ▲                    ▲
                     sweep ──overdue keys───┘

Stages do not know each other; this file wires them. What survives a crash is in the database: the change log, the
dirty keys, the refresh state. The Debouncer is rebuilt from them, so the service can be killed at any moment.

The file is a little longer than the others so that the wiring is read in one place.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import psycopg
import structlog

from listener import (
    backends,
    changes,
    connections,
    dead_letters,
    drift,
    queries,
    server_queries,
    startup,
    sweep,
    view_queries,
    web,
)
from listener.debounce import Debouncer
from listener.errors import DATABASE_TROUBLE, SetupError, is_lost, public_reason, reason
from listener.metrics import Metrics
from listener.notifications import ListenState, listen
from listener.refresh import Outcome
from listener.revisions import head
from listener.settings import Settings
from listener.silence import InUse, PatientConnection
from listener.views import Change
from listener.workers import Workers

log = structlog.get_logger("listener.service")


async def run(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT. Raises SetupError where it cannot start."""
    service = Service(settings)
    # Before anything is tried: an attempt to connect may fail before another task had its turn.
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as listening:
            listening.start_soon(_stop_on_signal, signals, service)
            await service.run()
            listening.cancel_scope.cancel()


class Service:
    """One replica. `on_outcome` is told of each refresh, after its commit."""

    def __init__(
        self, settings: Settings, on_outcome: Callable[[Change, Outcome], None] = lambda _change, _outcome: None
    ) -> None:
        self.settings = settings
        self.started = anyio.Event()
        self.metrics = Metrics()
        self.debouncer = Debouncer(settings.workers)
        self.listening = ListenState(
            on_reconnect=self.metrics.reconnects.inc, on_malformed=self.metrics.malformed_notifications.inc
        )
        self.in_use = InUse(
            settings.probe_timeout.total_seconds(),
            (settings.statement_timeout + settings.probe_timeout).total_seconds(),
            self.metrics.given_up.inc,
        )
        self.drainer = changes.Drainer(
            self._connection,
            self._drained,
            partial(self._take_dirty, overdue=False),
            settings.poll_interval.total_seconds(),
        )
        policy = dead_letters.RetryPolicy(
            settings.max_attempts, settings.retry_base, settings.retry_cap, settings.retry_quarantined
        )

        def refreshed(change: Change, outcome: Outcome) -> None:
            if outcome.outcome == "expanded":
                self.drainer.bell.ring()
            on_outcome(change, outcome)

        self.workers = Workers(self._connection, self.debouncer, self.metrics, policy, refreshed)
        self.verifying = drift.Rounds(settings.verify_keys, settings.sweep_interval.total_seconds(), self.metrics)
        self.port = 0
        # Why the database could not be used yet; None once it could.
        self._waits_for: str | None = "starting: the database has not answered yet"
        self._sweep_trouble: list[str] = []
        self._schema = head()  # the migration that the schema was last seen at
        self._starting = anyio.CancelScope()
        self._stop = anyio.Event()

    async def run(self) -> None:
        """Start-up, main loop, shutdown; HTTP answers all the while. Raises SetupError where it cannot start."""
        app = web.application(self.metrics.registry, self.reasons_not_ready, self._update_gauges)
        with web.bind(self.settings.http_host, self.settings.http_port) as bound:
            self.port = bound.getsockname()[1]
            async with web.serving(app, bound), AsyncExitStack() as opened:
                with self._starting:
                    await self.startup(opened)
                if not self._starting.cancel_called:
                    await self.main_loop()
        log.info("stopped")

    def stop(self) -> None:
        """Ends start-up or main loop: the refreshes under way finish within the grace period, the rest stays dirty."""
        self.workers.stop()
        self._stop.set()
        self._starting.cancel()

    async def startup(self, opened: AsyncExitStack) -> None:
        """Waits until the database can be used; then everything is checked, the pools are open, the state is read."""

        def waits_for(trouble: str) -> None:
            self._waits_for = trouble

        dirty = await startup.until_usable(lambda: self._take_up(opened), waits_for)
        self._waits_for = None
        log.info("serving", http=f"{self.settings.http_host}:{self.port}", dirty_keys=dirty)

    async def _take_up(self, opened: AsyncExitStack) -> int:
        """One attempt to start; how many keys are dirty. Raises UnavailableError where another one may succeed."""
        url = self.settings.database_url.get_secret_value()
        pooled = await startup.check(url, self.settings)
        async with AsyncExitStack() as opening:
            try:
                self.pool = await opening.enter_async_context(connections.pool(url, self.settings, pooled=pooled))
                self.http_pool = await opening.enter_async_context(
                    connections.http_pool(url, self.settings, pooled=pooled)
                )
                dirty = await self._read_state()
            except DATABASE_TROUBLE as error:
                refusal = SetupError(f"cannot read the state: {reason(error)}")
                raise startup.unavailable(error) or refusal from error
            opened.push_async_exit(opening.pop_all())
        return dirty

    async def _read_state(self) -> int:
        """Takes over the doorbell and what is dirty; the number of dirty keys. Raises psycopg.Error, PoolTimeout."""
        await self.drainer.heed_installation()
        await self.drainer.take_over()
        dirty = 0
        async with self._connection() as connection:
            await self._look_after(connection)
            async with aclosing(changes.pending(connection, anyio.current_time(), overdue=False)) as pending:
                async for change in pending:
                    self.debouncer.changed(change)
                    dirty += not change.aged
        return dirty

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
                        on_probe=self.in_use.judge,
                        # Most likely the others stand and carry nothing, too.
                        on_lost=self.pool.drain,
                    )

                stages.start_soon(listen_stage)
                stages.start_soon(self.drainer.run)
                stages.start_soon(sweep.run, self._sweep_once, settings.sweep_interval.total_seconds())
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

    @asynccontextmanager
    async def _connection(
        self, within: float = 10, pool: connections.Pool | None = None
    ) -> AsyncIterator[PatientConnection]:
        """A connection of the pool, had within so many seconds. Raises PoolTimeout."""
        pool = pool or self.pool
        connection = await connections.taken(pool, within)
        try:
            with self.in_use.noted(connection):
                yield connection
        except psycopg.Error as error:
            if is_lost(error):
                # The others have most likely gone the same way. Found out one by one, each would cost a backoff.
                with anyio.CancelScope(shield=True):
                    await pool.drain()
            raise
        finally:
            # Cancelled while it is given back, it would be lost, and its place in the pool with it.
            with anyio.CancelScope(shield=True):
                await pool.putconn(connection)

    def _drained(self, drained: changes.Drained) -> None:
        self.metrics.changes_drained.inc(drained.changes)
        for change in drained.keys:
            self.debouncer.changed(change)
        self.workers.due.ring()

    async def _after_grace(self) -> None:
        grace = self.settings.grace_period.total_seconds()
        # To cancel, to leave and to close the pool may take a second each, where the server does not answer.
        await anyio.sleep(max(grace - 4, grace / 2))
        log.warning(
            "the grace period is over: refreshes are cancelled and stay dirty", refreshes=self.workers.under_way
        )
        await self.workers.give_up()

    # -- sweep ---------------------------------------------------------------------------------------------------

    async def _sweep_once(self) -> None:
        try:
            # Before it looks: what it finds may start the polling.
            attended = self.drainer.bell.is_rung or self.drainer.doorbell.state != "resting"
            drained = len((await self.drainer.look()).keys)
            missed = await self._take_dirty(overdue=True)
            recovered = 0 if attended else drained
            self.metrics.sweep_recovered.inc(recovered + missed)
            # Not sooner: what began during the sweep must still be known to it.
            self.debouncer.forget_starts(anyio.current_time())
            await self.drainer.heed_installation()
            async with self._connection() as connection:
                await self._look_after(connection)
                if await self.verifying.go_on(connection):
                    self.drainer.bell.ring()
        except DATABASE_TROUBLE as error:
            self._sweep_trouble = [f"the last sweep failed: {public_reason(error)}"]
            log.warning("sweep failed; the next one tries again", reason=reason(error))

    async def _take_dirty(self, *, overdue: bool) -> int:
        """Hands dirty (or overdue) and aged keys that nobody attends to to the debouncer; how many were dirty."""
        missed = 0
        asked_at = anyio.current_time()
        running = self.debouncer.running_keys()
        async with (
            self._connection() as connection,
            aclosing(changes.pending(connection, anyio.current_time(), overdue=overdue)) as pending,
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
        schema = await server_queries.schema_revision(connection)
        if schema is not None and schema != self._schema:
            self._schema = schema
            log.warning("the schema is newer than this service, and serves it", schema=schema, service=head())
        done = await sweep.upkeep(connection, self.settings.letters_kept.total_seconds())
        self._sweep_trouble = done.troubles
        self.metrics.capture_repaired.inc(done.repaired)
        if done.marked:
            self.drainer.bell.ring()

    # -- web -----------------------------------------------------------------------------------------------------

    async def reasons_not_ready(self) -> list[str]:
        """One line for each thing that keeps the service from making progress; none names a tenant."""
        if self._waits_for is not None:
            return [self._waits_for]
        reasons = []
        holder = None
        try:
            with anyio.fail_after(2):
                async with self._connection(within=2, pool=self.http_pool) as connection:
                    reasons += await queries.readiness(connection)
                    reasons += await self._unbound(connection)
                    await queries.set_a_tenant(connection)
                    holder = await backends.drain_holder(connection)
        except TimeoutError:
            reasons.append("the database cannot be asked: no answer within 2 s")
        except DATABASE_TROUBLE as error:
            reasons.append(f"the database cannot be asked: {public_reason(error)}")
            log.warning("the database cannot be asked", reason=reason(error))
        if not self.listening.connected:
            reasons.append(f"not listening: {self.listening.trouble or 'connecting'}")
        elif not self.listening.probe_answered:
            reasons.append("the first probe of the listening connection has not come back yet")
        patience = 3 * self.settings.sweep_interval.total_seconds() + 5
        looked_at = self.drainer.looked_at
        by_whom = f"; {holder}" if holder else ""
        if self.drainer.trouble:
            reasons.append(f"not draining: {self.drainer.trouble}")
        elif looked_at is None:
            reasons.append(f"the first drain is not over yet{by_whom}")
        elif (ago := anyio.current_time() - looked_at) > patience:
            reasons.append(f"draining makes no progress: the last look was {ago:.0f} s ago{by_whom}")
        return reasons + self._sweep_trouble

    async def _unbound(self, connection: psycopg.AsyncConnection[Any]) -> list[str]:
        """A role that row-level security bound at the start may have been given more since."""
        computing = None if self.settings.allow_superuser else await server_queries.computing_role(connection)
        if computing is None or not computing[1]:
            return []
        return [f"role {computing[0]} is a superuser or has BYPASSRLS: row-level security does not bind it"]

    async def _update_gauges(self) -> None:
        # Whoever scrapes /metrics need not ask /health/ready as well.
        self.metrics.not_ready_reasons.set(len(await self.reasons_not_ready()))
        if self._waits_for is not None:
            return
        try:
            with anyio.fail_after(2):
                async with self._connection(within=2, pool=self.http_pool) as connection:
                    rows = await view_queries.view_gauges(connection)
                    database = await queries.database_gauges(connection)
        except (TimeoutError, *DATABASE_TROUBLE):
            return  # the reasons say so; the last values stand
        self.metrics.show(rows)
        self.metrics.change_log_rows.set(database.change_log_rows)
        self.metrics.oldest_transaction_age.set(database.oldest_transaction_age)
        self.metrics.notification_queue_ratio.set(database.notification_queue_ratio)


async def _stop_on_signal(signals: AsyncIterator[signal.Signals], service: Service) -> None:
    async for _ in signals:
        service.stop()
