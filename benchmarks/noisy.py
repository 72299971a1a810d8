"""A noisy tenant: what the others see of one that writes a hundred times as much, with refreshes that take as long."""

from __future__ import annotations

import argparse
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg

from benchmarks.bench import Result, database, percentile, service
from benchmarks.sales import all_fresh, create_sales, pgbench, tenant_of
from listener.embedded import EmbeddedServer

NAME = "bench_noisy"
TENANTS = 100  # beside the noisy one, which is the last
ROWS = 1000  # a tenant; the noisy one has a hundred times as many
NOISE = 100
RATE = 0.5  # writes a second of each of the others
WATCHERS = 4


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """Staleness of the others' writes, as their sessions see it, without and with the noisy tenant, in turns."""
    seen: dict[bool, list[float]] = {False: [], True: []}
    with database(server, NAME) as administrator:
        create_sales(administrator, views=5, tenants=TENANTS + 1, rows_per_tenant=ROWS)
        administrator.execute(
            f"""
            INSERT INTO sales (tenant_id, channel, cents)
            SELECT {tenant_of(str(TENANTS + 1))}, 'channel ' || n % 5, n FROM generate_series(1, {ROWS * NOISE}) n
            """.encode()
        )
        administrator.execute("VACUUM ANALYZE sales")
        with service(server, NAME):
            until_fresh(administrator)
            for _ in range(options.rounds):
                for noisy in (False, True):
                    seen[noisy] += _measure(server, noisy=noisy, seconds=options.load_seconds)
                    until_fresh(administrator)
        took = administrator.execute(
            f"""
            SELECT tenant = {tenant_of(str(TENANTS + 1))}::text, extract(epoch FROM avg(duration)) * 1000
            FROM listener.refresh_state WHERE tenant <> '' GROUP BY 1 ORDER BY 1
            """.encode()
        ).fetchall()
    result = Result(
        f"A noisy tenant: {NOISE} times the writes of {TENANTS} others, five views, {os.cpu_count()} cores, 4 workers",
        ["", "p50 of the others (s)", "p99 of the others (s)", "samples"],
        note="From commit to visible in the view of totals. The target: p99 at most doubles. One refresh took "
        f"{took[0][1]:.1f} ms of the others, {took[1][1]:.0f} ms of the noisy one.",
    )
    for noisy, values in seen.items():
        result.rows.append(
            ("with the noisy tenant" if noisy else "without", f"{percentile(values, 0.5):.2f}",
             f"{percentile(values, 0.99):.2f}", len(values))
        )  # fmt: skip
    return [result]


def _measure(server: EmbeddedServer, *, noisy: bool, seconds: float) -> list[float]:
    over = threading.Event()
    samples: list[float] = []
    with ThreadPoolExecutor(WATCHERS + 2) as sessions:
        watching = [sessions.submit(_watch, server, over) for _ in range(WATCHERS)]
        load = [sessions.submit(_write, server, f"random(1, {TENANTS})", RATE * TENANTS, seconds)]
        if noisy:
            load.append(sessions.submit(_write, server, str(TENANTS + 1), RATE * NOISE, seconds))
        for writer in load:
            writer.result()
        over.set()
        for watcher in watching:
            samples += watcher.result()
    return samples


def _write(server: EmbeddedServer, tenant: str, rate: float, seconds: float) -> float:
    script = (
        f"\\set n {tenant}\n\\set c random(0, 4)\n"
        f"INSERT INTO sales (tenant_id, channel, cents) VALUES ({tenant_of(':n')}, 'channel ' || :c, :n);\n"
    )
    return pgbench(server, NAME, script, clients=4, seconds=seconds, rate=rate)


def _watch(server: EmbeddedServer, over: threading.Event) -> list[float]:
    """Seconds from commit to visible of rows that this session writes for the others, one after the other."""
    seen = []
    with psycopg.connect(server.url(database=NAME), autocommit=True) as session:
        while not over.is_set():
            row = session.execute(
                f"""
                INSERT INTO sales (tenant_id, channel, cents)
                SELECT {tenant_of(f"1 + floor(random() * {TENANTS})")}, 'watched', 1 RETURNING tenant_id, sold_at
                """.encode()
            ).fetchone()
            committed = time.perf_counter()
            assert row is not None
            while not session.execute("SELECT FROM totals WHERE tenant_id = %s AND newest >= %s", row).rowcount:
                if time.perf_counter() - committed > 120:
                    raise RuntimeError("a write was not shown within two minutes")
                time.sleep(0.005)
            seen.append(time.perf_counter() - committed)
    return seen


def until_fresh(administrator: psycopg.Connection[tuple[object, ...]]) -> None:
    """Raises RuntimeError after ten minutes."""
    started = time.perf_counter()
    while not all_fresh(administrator):
        time.sleep(0.1)
        if time.perf_counter() - started > 600:
            raise RuntimeError("not fresh within ten minutes")
