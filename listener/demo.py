"""`listener demo`: a server of its own, the sample schema, an application that writes, the service, a live table."""

from __future__ import annotations

import logging
import random
import signal
import socket
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psycopg
from anyio.abc import TaskStatus
from pydantic import SecretStr
from rich.console import Group, RenderableType
from rich.live import Live
from rich.status import Status
from rich.text import Text

from listener import console, logs, operations, view_queries
from listener.embedded import EmbeddedServer
from listener.load import LoadCounters, write_load
from listener.migrate import roles_script, upgrade
from listener.refresh import Outcome
from listener.replay import Ledger, ReplayCounters, read_ledger, replay, tenant_of
from listener.sample import create_tenants, load_sample
from listener.service import Service
from listener.settings import Settings
from listener.views import Change

DATABASE = "demo"
HTTP_PORT = 9546
# The live table counts what happened within so many seconds.
RECENT = 10.0
# How long the end waits for the last changes to be shown.
PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """What `listener demo` was asked for."""

    seconds: float | None
    replay: Path | None
    tenants: int
    rate: float
    seed: int | None


@dataclass(slots=True)
class Seen:
    """What the service did to one view: when, and how stale the oldest change was (seconds)."""

    refreshes: int = 0
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    staleness: list[float] = field(default_factory=list)


class Demo:
    """The running parts, and what is shown of them."""

    def __init__(self, server: EmbeddedServer, options: Options, ledger: Ledger | None) -> None:
        self.server = server
        self.options = options
        self.ledger = ledger
        self.seen: dict[str, Seen] = {}
        self.seed = random.randrange(2**31) if options.seed is None else options.seed
        self.replayed = ReplayCounters()
        self.replay_seconds: float | None = None
        self.load = LoadCounters()
        self.written_seconds: float | None = None
        self.stop = anyio.Event()
        self.interrupted = False
        self.started = 0.0
        port = HTTP_PORT if _is_free(HTTP_PORT) else 0
        self.settings = Settings(database_url=SecretStr(self._url("listener_service")), http_port=port)
        self.service = Service(self.settings, on_outcome=self._record)

    def _url(self, user: str) -> str:
        return self.server.url(user=user, database=DATABASE)

    def _record(self, change: Change, outcome: Outcome) -> None:
        if outcome.outcome != "refreshed":
            return
        now = anyio.current_time()
        seen = self.seen.setdefault(change.key.view, Seen())
        seen.refreshes += 1
        seen.recent.append((now, now - change.first_change))
        # A filling's keys waited for their turn; only what the application wrote counts as staleness.
        if not change.bulk:
            seen.staleness.append(now - change.first_change)

    def _invitation(self) -> str:
        """Commands to paste into another terminal: a target, and a source, whose policy wants to know the tenant."""
        tenant = tenant_of("tenant 1") if self.ledger is None else self.ledger.invoices[0].tenant
        psql = f"{self.server.bin('psql')} '{self._url('listener_service')}'"
        target = "-c 'TABLE dashboard.mv_realtime_revenue'"
        source = f"""-c "SET app.current_tenant_id = '{tenant}'" -c 'TABLE public.revenue_ledger LIMIT 5'"""
        return f"look around: {psql} {target}\na source:    {psql} {source}"

    def set_up(self) -> None:
        """Database, roles, schema, sample: as an administrator and as the owner would do by hand."""
        with psycopg.connect(self.server.url(), autocommit=True) as administrator:
            administrator.execute(b"CREATE DATABASE demo")
        with psycopg.connect(self._url("postgres"), autocommit=True) as administrator:
            administrator.execute(roles_script(self.settings, DATABASE).encode())
            upgrade(Settings(database_url=SecretStr(self._url("postgres"))))
            load_sample(administrator)

    async def run(self) -> None:
        """Writes and serves until the time is over, the replay has ended, or Ctrl-C; then until all is fresh."""
        async with anyio.create_task_group() as watching:
            await watching.start(self._watch_signals)
            console.out.print(self._invitation(), soft_wrap=True)
            async with anyio.create_task_group() as serving:
                serving.start_soon(self.service.run)
                await self.service.started.wait()
                self.started = anyio.current_time()
                watching.start_soon(self._show)
                await self._write_until_told()
                if not self.interrupted:
                    with anyio.move_on_after(PATIENCE):
                        await self._until_fresh()
                self.service.stop()
            watching.cancel_scope.cancel()

    async def _write_until_told(self) -> None:
        async with anyio.create_task_group() as writing:
            writing.start_soon(self._write)
            with anyio.move_on_after(self.options.seconds):
                await self.stop.wait()
            self.written_seconds = anyio.current_time() - self.started
            writing.cancel_scope.cancel()

    async def _watch_signals(self, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self.interrupted = True
                self.stop.set()

    async def _write(self) -> None:
        application = self._url("listener_app")
        if self.ledger is not None:
            summary = await replay(self.ledger, application, self.replayed)
            self.replay_seconds = summary.seconds
            self.stop.set()
            return
        tenants = [(tenant_of(name), name) for name in (f"tenant {n + 1}" for n in range(self.options.tenants))]
        with anyio.CancelScope(shield=True):
            async with await psycopg.AsyncConnection.connect(application, autocommit=True) as connection:
                await create_tenants(connection, tenants)
        ids = [tenant for tenant, _ in tenants]
        await write_load(application, ids, self.load, random.Random(self.seed), rate=self.options.rate)

    async def _until_fresh(self) -> None:
        """Until no change is unconsumed or dirty, or Ctrl-C."""
        async with await psycopg.AsyncConnection.connect(self._url("postgres"), autocommit=True) as connection:
            while True:
                if self.interrupted or await view_queries.all_fresh(connection):
                    return
                await anyio.sleep(0.1)

    async def _show(self) -> None:
        async with await psycopg.AsyncConnection.connect(self._url("postgres"), autocommit=True) as connection:
            with Live(console=console.out, auto_refresh=False, transient=True) as live:
                while True:
                    # Cancelled between two pictures, not in the middle of a query.
                    with anyio.CancelScope(shield=True):
                        live.update(Group(*await self.picture(connection)), refresh=True)
                    await anyio.sleep(0.5)

    async def picture(self, connection: psycopg.AsyncConnection[Any]) -> list[RenderableType]:
        """The table per view, under a line that says what is being written."""
        now = anyio.current_time()
        sizes = {row["view"]: row for row in await view_queries.target_sizes(connection)}
        rows = []
        for view, size in sizes.items():
            seen = self.seen.get(view, Seen())
            while seen.recent and seen.recent[0][0] < now - RECENT:
                seen.recent.popleft()
            lasted = min(RECENT, max(now - self.started, 0.1))
            rows.append(
                {
                    "view": view,
                    "rows": size["rows"],
                    "dirty": size["dirty_keys"],
                    "refreshes": seen.refreshes,
                    "per s": f"{len(seen.recent) / lasted:.0f}",
                    **_percentiles(seen.staleness),
                }
            )
        return [Text(self.what()), console.table(rows, rows[0] if rows else [])]

    def what(self) -> str:
        """What was written so far, and how fast."""
        seconds = max(anyio.current_time() - self.started, 0.001)
        if self.ledger is not None:
            done = self.replayed.committed
            rate = done / (self.replay_seconds or seconds)
            return f"{done} of {self.replayed.total} invoices replayed, {rate:.0f} a second"
        done = self.load.commits
        of = f"{self.options.tenants} tenants, seed {self.seed}"
        return f"{done} transactions, {done / (self.written_seconds or seconds):.0f} a second, {of}"

    async def summary(self) -> bool:
        """Prints the last table and what `verify` finds; whether every target is exact.

        Ctrl-C is the way out of a demo without an end of its own: nothing is verified, and nothing is wrong.
        """
        differences = []
        compared = 0
        async with await psycopg.AsyncConnection.connect(self._url("listener_service"), autocommit=True) as connection:
            async with await psycopg.AsyncConnection.connect(self._url("postgres"), autocommit=True) as administrator:
                for part in await self.picture(administrator):
                    console.out.print(part)
            if self.interrupted:
                console.out.print("interrupted: not verified")
                return self.options.seconds is None and self.ledger is None
            names = [row["view"] for row in await view_queries.views(connection)]
            async for done, _, difference in operations.verify(connection, names):
                compared = done
                if difference is not None:
                    differences.append(difference)
        for difference in differences[:10]:
            console.error(f"{difference.view} differs for tenant {difference.tenant_id}")
        console.out.print(f"verify: {compared} keys compared with their definition, {len(differences)} differ")
        return not differences


def _percentiles(staleness: list[float]) -> dict[str, str]:
    if not staleness:
        return {"stale p50": "-", "stale p99": "-"}
    cuts = statistics.quantiles(staleness, n=100, method="inclusive") if len(staleness) > 1 else staleness * 99
    return {"stale p50": console.duration(cuts[49]), "stale p99": console.duration(cuts[98])}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def run(options: Options) -> bool:
    """Runs the demo; whether every target was exact at the end. Raises ReplayError before anything is started."""
    logs.configure("error", "console")
    # Where the service stops in the middle of a query, psycopg warns that it closes the connection.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    ledger = None if options.replay is None else await anyio.to_thread.run_sync(read_ledger, options.replay)
    with Status("starting PostgreSQL", console=console.err) as status:
        _step("starting PostgreSQL")
        server = await anyio.to_thread.run_sync(EmbeddedServer.start)
        try:
            demo = Demo(server, options, ledger)
            status.update("creating roles, schema and sample")
            _step("creating roles, the schema listener and the sample schema with its five views")
            await anyio.to_thread.run_sync(demo.set_up)
        except BaseException:
            server.stop()
            raise
    with server:
        await demo.run()
        return await demo.summary()


def _step(what: str) -> None:
    """Progress for those who see no spinner."""
    if not sys.stderr.isatty():
        console.err.print(what)
