"""Filling a view over a table that is there: source rows a second, by `listener fill` and by the service alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import psycopg

from benchmarks.bench import Result, database, service
from benchmarks.sales import VIEWS, all_fresh, create_sales, differing_in
from listener.embedded import EmbeddedServer

TENANTS = 1000


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row for each way to fill the same two views, one with a row a tenant and one with many."""
    rows = options.fill_rows
    result = Result(
        f"Filling a view over {rows:,} rows of {TENANTS:,} tenants, under row-level security",
        ["view", "by", "seconds", "source rows a second", "keys a second", "rows that differ"],
        note="The target is 200,000 source rows a second on two cores. What `listener fill` took has the start of its"
        " process in it, about a second.",
    )
    with database(server, "bench_fill") as administrator:
        create_sales(administrator, views=0, tenants=TENANTS, rows_per_tenant=rows // TENANTS)
        administrator.execute(
            "ALTER TABLE sales ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; CREATE POLICY tenant ON sales"
            " USING (tenant_id = current_setting('app.current_tenant_id')::uuid)"
        )
        for view in ("totals", "by_channel_and_day"):
            for workers in (1, 2, 4):
                took = _filled(server, administrator, view, workers)
                by = f"listener fill --workers {workers}"
                result.rows.append(_row(administrator, view, by, took, rows))
            result.rows.append(
                _row(administrator, view, "the service alone, 4 workers", _served(server, administrator, view), rows)
            )
    return [result]


def _row(administrator: psycopg.Connection[Any], view: str, by: str, took: float, rows: int) -> tuple[object, ...]:
    differ = differing_in(administrator, view)
    administrator.execute("SELECT listener.drop_view(%s)", (view,))
    return view, by, f"{took:.1f}", f"{rows / took:,.0f}", f"{TENANTS / took:,.0f}", differ


def _create(administrator: psycopg.Connection[Any], view: str) -> None:
    keys, query = VIEWS[view]
    administrator.execute(
        "SELECT listener.create_view(%s, %s, %s::name[], tenants_query => 'SELECT id FROM tenants')",
        (view, query, keys),
    )


def _filled(server: EmbeddedServer, administrator: psycopg.Connection[Any], view: str, workers: int) -> float:
    _create(administrator, view)
    url = server.url(user="listener_service", database="bench_fill")
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "listener", "fill", view, f"--workers={workers}", "--json"],
        env=os.environ | {"LISTENER_DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def _served(server: EmbeddedServer, administrator: psycopg.Connection[Any], view: str) -> float:
    with service(server, "bench_fill"):
        started = time.perf_counter()
        _create(administrator, view)
        while not all_fresh(administrator):
            time.sleep(0.05)
        return time.perf_counter() - started
