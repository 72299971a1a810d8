"""Another session holds a snapshot open while many writes come: nothing may get slower and slower.

The views show each tenant's latest sales, by an index: a refresh reads as much at the end as at the start, so what gets
slower is not the growing table.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

import psycopg

from benchmarks.bench import Result, database, service
from benchmarks.sales import create_sales, insert_script, pgbench, tenant_of
from listener.embedded import EmbeddedServer

TENANTS = 1000
NAME = "bench_held"
SLICES = 6
LATEST = """
SELECT t.id AS tenant_id, s.sales, s.cents, s.newest FROM tenants t CROSS JOIN LATERAL (
    SELECT count(*) AS sales, sum(l.cents)::bigint AS cents, max(l.sold_at) AS newest
    FROM (SELECT cents, sold_at FROM sales WHERE tenant_id = t.id ORDER BY sold_at DESC LIMIT {}) l) s
"""


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """A row per slice of the time: commits, one drain, one refresh of the hottest key (ms, medians).

    Two views, one of them refreshed by hand for the measurement; the service does the rest.
    """
    slices: list[tuple[str, float, float, float]] = []
    with database(server, NAME) as administrator:
        create_sales(administrator, views=0, tenants=TENANTS, rows_per_tenant=10)
        administrator.execute("SET ROLE listener_owner")
        for name, rows_shown in (("latest", 10), ("latest_hundred", 100)):
            administrator.execute(
                "SELECT listener.create_view(%s, %s, '{tenant_id}')", (name, LATEST.format(rows_shown))
            )
        administrator.execute("RESET ROLE")
        script = insert_script("sales", TENANTS, skewed=True)
        with service(server, NAME), psycopg.connect(server.url(database=NAME)) as holder:
            pgbench(server, NAME, script, clients=16, seconds=3)
            slices.append(_slice(server, script, options.hold_rate, options.hold_seconds / SLICES, "before"))
            holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            holder.execute("SELECT count(*) FROM tenants")
            slices += [
                _slice(server, script, options.hold_rate, options.hold_seconds / SLICES, f"{number + 1} of {SLICES}")
                for number in range(SLICES)
            ]
            dead = administrator.execute(
                "SELECT relname, n_dead_tup FROM pg_stat_user_tables WHERE schemaname = 'listener' AND n_dead_tup > 0"
                " ORDER BY n_dead_tup DESC LIMIT 3"
            ).fetchall()
    return [
        Result(
            f"A snapshot held open for {options.hold_seconds:.0f} s under {options.hold_rate:,.0f} writes a second",
            ["slice", "commits/s", "one drain (ms)", "the hottest key's refresh (ms)"],
            rows=[(name, f"{rate:,.0f}", f"{drain:.2f}", f"{refresh:.2f}") for name, rate, drain, refresh in slices],
            note="The targets: commits within 0.9 of the start, drain and refresh within twice. Dead rows at the end: "
            + ", ".join(f"{name} {count:,}" for name, count in dead),
        )
    ]


def _slice(
    server: EmbeddedServer, script: str, rate: float, seconds: float, name: str
) -> tuple[str, float, float, float]:
    over = threading.Event()
    drains: list[float] = []
    refreshes: list[float] = []

    def probe() -> None:
        url = server.url(user="listener_service", database=NAME)
        with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as session:
            while not over.wait(0.25):
                _time(session, drains, "SELECT outcome FROM listener.drain()", "drained")
                _time(
                    session, refreshes, f"SELECT outcome FROM listener.refresh('latest', {tenant_of('1')})", "refreshed"
                )

    prober = threading.Thread(target=probe)
    prober.start()
    achieved = pgbench(server, NAME, script, clients=16, seconds=seconds, rate=rate)
    over.set()
    prober.join()
    drain, refresh = (statistics.median(values) if values else float("nan") for values in (drains, refreshes))
    return name, achieved, drain, refresh


def _time(session: psycopg.Connection[Any], into: list[float], statement: str, outcome: str) -> None:
    """Only what did something counts, not what found somebody else at it."""
    started = time.perf_counter()
    rows = session.execute(statement.encode()).fetchall()
    if rows and rows[0][0] == outcome:
        into.append((time.perf_counter() - started) * 1000)
