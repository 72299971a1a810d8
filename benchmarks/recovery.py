"""How soon a change is shown after connections were killed, and after the server was restarted."""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any, LiteralString

import psycopg

from benchmarks.bench import Result, database, percentile, service
from listener.embedded import EmbeddedServer
from listener.sample import load_sample

TENANTS = 50
PAUSE = 0.5  # seconds between two faults: the service is calm again, and nobody polls
PATIENCE = 60.0

KILL: LiteralString = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
# The pool serves its connections in turn: the one that was used last is not the next one's.
KILLS: dict[str, LiteralString] = {
    "the listening backend": KILL + "application_name = 'listener listen'",
    "the pool's next": KILL + "pid = (SELECT pid FROM pg_stat_activity WHERE application_name = 'listener'"
    " ORDER BY state_change LIMIT 1)",
    "the whole pool": KILL + "application_name = 'listener'",
    "all of them": KILL + "application_name IN ('listener', 'listener listen')",
}


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row per fault, in milliseconds. Shown: another session's SELECT on the dashboard shows the change."""
    result = Result(
        "From a fault until a change is shown (ms)",
        ["fault", "times", "p50", "p99", "max"],
        note=(
            "Kills: from pg_terminate_backend, the change is written right after it. In mid-refresh: the change is the "
            "one that is being refreshed. The restart is an immediate one, with recovery: from the moment in which the "
            "server takes connections; the change was written just before. The targets are p99 <= 1000 and <= 2000."
        ),
    )
    with database(server, "bench_recovery") as administrator:
        load_sample(administrator)
        tenants = [uuid.uuid4() for _ in range(TENANTS)]
        with administrator.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO tenants (id, name) VALUES (%s, %s)", [(tenant, str(tenant)) for tenant in tenants]
            )
        with service(server, "bench_recovery"):
            with _connected(server, "listener_app") as writer:
                for tenant in tenants:
                    _until_shown(administrator, tenant, _write(writer, tenant))
                for fault, kill in KILLS.items():
                    took = []
                    for number in range(options.kills):
                        tenant = tenants[number % TENANTS]
                        time.sleep(PAUSE)
                        started = time.perf_counter()
                        administrator.execute(kill)
                        _until_shown(administrator, tenant, _write(writer, tenant))
                        took.append(time.perf_counter() - started)
                    result.rows.append(_row(f"pg_terminate_backend: {fault}", took))
                took = [
                    _in_mid_refresh(server, administrator, writer, tenants[number % TENANTS])
                    for number in range(options.kills)
                ]
                result.rows.insert(1, _row("pg_terminate_backend: a worker's, in mid-refresh", took))
            took = []
            for number in range(options.restarts):
                tenant = tenants[number % TENANTS]
                time.sleep(PAUSE)
                with _connected(server, "listener_app") as writer:
                    change = _write(writer, tenant)
                    server.restart("immediate")
                started = time.perf_counter()
                with _connected(server, "postgres") as reader:
                    _until_shown(reader, tenant, change)
                took.append(time.perf_counter() - started)
            result.rows.append(_row("an immediate restart of the server", took))
    return [result]


def _in_mid_refresh(
    server: EmbeddedServer, administrator: psycopg.Connection[Any], writer: psycopg.Connection[Any], tenant: uuid.UUID
) -> float:
    time.sleep(PAUSE)
    waits = (
        KILL + "application_name = 'listener' AND wait_event_type = 'Lock' AND query LIKE '%listener.refresh\\_dirty(%'"
    )
    # A connection of its own: within a transaction pg_stat_activity does not change.
    with _connected(server, "postgres") as holder, holder.transaction():
        holder.execute("LOCK TABLE dashboard.mv_realtime_revenue IN EXCLUSIVE MODE")
        change = _write(writer, tenant)
        started = time.perf_counter()
        deadline = started + PATIENCE
        while not administrator.execute(waits).rowcount:
            started = time.perf_counter()
            if started > deadline:
                raise RuntimeError(f"no refresh began within {PATIENCE:g} s")
    _until_shown(administrator, tenant, change)
    return time.perf_counter() - started


def _connected(server: EmbeddedServer, user: str) -> psycopg.Connection[Any]:
    return psycopg.connect(server.url(user=user, database="bench_recovery"), autocommit=True)


def _write(writer: psycopg.Connection[Any], tenant: uuid.UUID) -> Any:
    """One more row of the ledger; its time, by which it is known on the dashboard."""
    with writer.transaction():
        writer.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(tenant),))
        row = writer.execute(
            """
            INSERT INTO revenue_ledger
                (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state, updated_at)
            VALUES (%s, %s, 1, 1, 'EUR', 'captured', clock_timestamp()) RETURNING updated_at
            """,
            (tenant, uuid.uuid4().hex),
        ).fetchone()
    assert row is not None
    return row[0]


def _until_shown(reader: psycopg.Connection[Any], tenant: uuid.UUID, change: Any) -> None:
    deadline = time.perf_counter() + PATIENCE
    shown = "SELECT FROM dashboard.mv_realtime_revenue WHERE tenant_id = %s AND newest_update_at >= %s"
    while not reader.execute(shown, (tenant, change)).rowcount:
        if time.perf_counter() > deadline:
            raise RuntimeError(f"a change was not shown within {PATIENCE:g} s")


def _row(fault: str, took: list[float]) -> tuple[object, ...]:
    return (fault, len(took), *(f"{percentile(took, share) * 1000:.0f}" for share in (0.5, 0.99, 1)))
