"""Adopting a materialized view while it is read and its source is written: how long readers are held up, at most."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from benchmarks.bench import Result, database, percentile, service
from benchmarks.noisy import until_fresh
from benchmarks.sales import create_sales, pgbench, tenant_of
from listener.embedded import EmbeddedServer

NAME = "bench_adopt"
ITEMS = 1000  # result rows of a tenant
READERS = 2  # of the materialized view, and as many of the view on top
CALM = 10.0  # seconds of reads before it begins, and after it ended
QUERY = "SELECT tenant_id, channel, count(*) AS sales, sum(cents) AS cents FROM sales GROUP BY tenant_id, channel"


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row: the command as a user runs it, beside a service, writers and readers."""
    tenants = max(1, options.adopt_rows // ITEMS)
    with database(server, NAME) as administrator:
        _prepare(administrator, tenants)
        over = threading.Event()
        with service(server, NAME), ThreadPoolExecutor(2 * READERS + 1) as sessions:
            reading = [
                sessions.submit(_read, server, relation, tenants, over)
                for relation in ("items", "items_on_top")
                for _ in range(READERS)
            ]
            writing = sessions.submit(_write, server, tenants, options.adopt_rate, over)
            time.sleep(CALM)
            began = time.perf_counter()
            told = _adopt(server)
            ended = time.perf_counter()
            time.sleep(CALM)
            over.set()
            reads = [read for reader in reading for read in reader.result()]
            written = writing.result()
            until_fresh(administrator)
        row = administrator.execute(
            f"""
            SELECT (SELECT count(*) FROM ({QUERY} EXCEPT ALL SELECT * FROM items) a)
                 + (SELECT count(*) FROM (SELECT * FROM items EXCEPT ALL {QUERY}) b), (SELECT count(*) FROM items)
            """.encode()
        ).fetchone()
    assert row is not None
    before = [took for at, took in reads if at < began]
    meanwhile = [took for at, took in reads if began <= at <= ended]
    result = Result(
        f"Adopting a materialized view of {row[1]:,} rows, with {options.adopt_rate:g} writes a second",
        ["", "before", "while it is adopted"],
        note="The target: no reader waits longer than 100 ms, and no write fails. Half of the readers read a view on"
        f" top. The refreshes and they share {os.cpu_count()} cores.",
    )
    result.rows += [
        ("longest read (ms)", f"{max(before) * 1000:.0f}", f"{max(meanwhile) * 1000:.0f}"),
        ("p99 of reads (ms)", f"{percentile(before, 0.99) * 1000:.1f}", f"{percentile(meanwhile, 0.99) * 1000:.1f}"),
        ("reads", f"{len(before):,}", f"{len(meanwhile):,}"),
        ("readers locked out by the swap (ms)", "", f"{told['locked_seconds'] * 1000:.0f}"),
        ("attempts at the swap", "", told["attempts"]),
        ("took (s)", "", f"{ended - began:.0f}"),
        ("writes a second, all of them successful", "", f"{written:.0f}"),
        ("rows that differ afterwards", "", row[0]),
    ]
    return [result]


def _prepare(administrator: psycopg.Connection[Any], tenants: int) -> None:
    create_sales(administrator, views=0, tenants=tenants)
    administrator.execute("SET ROLE listener_owner")
    administrator.execute(
        f"""
        INSERT INTO sales (tenant_id, channel, cents)
        SELECT {tenant_of("t")}, 'item ' || n, n FROM generate_series(1, {ITEMS}) n, generate_series(1, {tenants}) t
        """.encode()
    )
    administrator.execute(f"CREATE MATERIALIZED VIEW items AS {QUERY}".encode())
    administrator.execute("CREATE UNIQUE INDEX items_key ON items (tenant_id, channel)")
    administrator.execute("CREATE INDEX items_by_sales ON items (sales)")
    administrator.execute("CREATE VIEW items_on_top AS SELECT tenant_id, sum(cents) AS cents FROM items GROUP BY 1")
    administrator.execute("RESET ROLE")
    administrator.execute("VACUUM ANALYZE sales")
    administrator.execute("VACUUM ANALYZE items")


def _adopt(server: EmbeddedServer) -> Any:
    """What the command tells. Its key is refreshed at most every ten seconds: a refresh computes a thousand rows."""
    command = [
        sys.executable, "-m", "listener", "adopt", "public.items", "--tenants-query", "SELECT id FROM public.tenants",
        "--quiet-period", "10 s", "--max-wait", "30 s", "--json",
    ]  # fmt: skip
    environment = os.environ | {"LISTENER_DATABASE_URL": server.url(database=NAME)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def _write(server: EmbeddedServer, tenants: int, rate: float, over: threading.Event) -> float:
    """Writes a second. Raises RuntimeError where one failed."""
    script = (
        f"\\set t random(1, {tenants})\n\\set n random(1, {ITEMS})\n"
        f"INSERT INTO sales (tenant_id, channel, cents) VALUES ({tenant_of(':t')}, 'item ' || :n, :n);\n"
    )
    rates = []
    while not over.is_set():
        rates.append(pgbench(server, NAME, script, clients=4, seconds=5, rate=rate))
    return sum(rates) / len(rates)


def _read(server: EmbeddedServer, relation: str, tenants: int, over: threading.Event) -> list[tuple[float, float]]:
    """When each read began, and how long it took; seconds."""
    seen = []
    query = f"SELECT sum(cents) FROM {relation} WHERE tenant_id = %s".encode()
    with psycopg.connect(server.url(database=NAME), autocommit=True) as session:
        while not over.is_set():
            tenant = f"00000000-0000-4000-8000-{random.randint(1, tenants):012}"
            began = time.perf_counter()
            session.execute(query, (tenant,))
            seen.append((began, time.perf_counter() - began))
            time.sleep(0.002)
    return seen
