"""Commit -> visible, for single writes in calm."""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

import psycopg

from benchmarks.bench import Result, database, percentile, service
from listener.embedded import EmbeddedServer
from listener.sample import load_sample

TENANTS = 50
PAUSE = 0.1  # seconds between two writes: longer than a refresh takes, so that none meets another


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row per way, in milliseconds. Visible: another session's SELECT on the dashboard shows the row."""
    with database(server, "bench_calm") as administrator:
        load_sample(administrator)
        tenants = [uuid.uuid4() for _ in range(TENANTS)]
        with administrator.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO tenants (id, name) VALUES (%s, %s)", [(tenant, str(tenant)) for tenant in tenants]
            )
        application = server.url(user="listener_app", database="bench_calm")
        with service(server, "bench_calm"), psycopg.connect(application, autocommit=True) as writer:
            for tenant in tenants:
                _write_and_see(writer, administrator, tenant)
            seen = []
            for number in range(options.writes):
                time.sleep(PAUSE)
                seen.append(_write_and_see(writer, administrator, tenants[number % TENANTS]))
        bell = _doorbell(server, options.writes)
        call = _refresh_call(server, tenants, options.writes)
    result = Result(
        "Commit to visible, single writes in calm (ms)",
        ["what", "p50", "p95", "p99", "max"],
        note="The ledger has two views, so a write is two refreshes; the target is p50 <= 5 ms and p99 <= 20 ms.",
    )
    for what, values in (
        ("a write, by the service, until a reader sees it", seen),
        ("floor: a bare NOTIFY from session to session", bell),
        ("floor: listener.drain() and one listener.refresh()", call),
    ):
        shares = [percentile(values, share) * 1000 for share in (0.5, 0.95, 0.99, 1)]
        result.rows.append((what, *(f"{value:.2f}" for value in shares)))
    return [result]


def _write_and_see(writer: psycopg.Connection[Any], reader: psycopg.Connection[Any], tenant: uuid.UUID) -> float:
    shown = "SELECT newest_update_at FROM dashboard.mv_realtime_revenue WHERE tenant_id = %s"
    before = reader.execute(shown, (tenant,)).fetchone()
    with writer.transaction():
        writer.execute("SELECT set_config('app.current_tenant_id', %s, true)", (str(tenant),))
        writer.execute(
            """
            INSERT INTO revenue_ledger
                (tenant_id, transaction_id, amount_cents, revenue_cents, currency, state, updated_at)
            VALUES (%s, %s, 1, 1, 'EUR', 'captured', clock_timestamp())
            """,
            (tenant, uuid.uuid4().hex),
        )
    committed = time.perf_counter()
    while reader.execute(shown, (tenant,)).fetchone() == before:
        if time.perf_counter() - committed > 60:
            raise RuntimeError("a write was not shown within a minute")
    return time.perf_counter() - committed


def _doorbell(server: EmbeddedServer, count: int) -> list[float]:
    with (
        psycopg.connect(server.url(), autocommit=True) as caller,
        psycopg.connect(server.url(), autocommit=True) as hearer,
    ):
        hearer.execute("LISTEN bench")
        heard = []
        for _ in range(count):
            caller.execute("NOTIFY bench")
            started = time.perf_counter()
            next(hearer.notifies(stop_after=1))
            heard.append(time.perf_counter() - started)
        return heard


def _refresh_call(server: EmbeddedServer, tenants: list[uuid.UUID], count: int) -> list[float]:
    url = server.url(user="listener_service", database="bench_calm")
    with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as connection:
        took = []
        for number in range(count):
            tenant = tenants[number % len(tenants)]
            started = time.perf_counter()
            connection.execute("SELECT outcome FROM listener.drain()").fetchall()
            connection.execute("SELECT listener.refresh('mv_realtime_revenue', %s::uuid)", (tenant,)).fetchone()
            took.append(time.perf_counter() - started)
        return took
