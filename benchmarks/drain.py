"""How fast a backlog of the change log is drained."""

from __future__ import annotations

import argparse
import time

import psycopg

from benchmarks.bench import Result, database
from listener.embedded import EmbeddedServer
from listener.sample import load_sample


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One drain of `rows` log rows of 1,000 tenants, beside a plain aggregate over the same rows."""
    with database(server, "bench_drain") as administrator:
        load_sample(administrator)
        administrator.execute(
            """
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
            SELECT pg_current_xact_id(), clock_timestamp(), s.id, md5((n %% 1000)::text)::uuid::text
            FROM generate_series(1, %s) n,
                 (SELECT min(id) FROM listener.source WHERE table_name = 'revenue_ledger') AS s (id)
            """,
            (options.rows,),
        )
        administrator.execute("VACUUM ANALYZE listener.change_log")
        started = time.perf_counter()
        administrator.execute(
            "SELECT source_id, tenant, count(*), min(changed_at) FROM listener.change_log GROUP BY 1, 2"
        ).fetchall()
        floor = time.perf_counter() - started
        url = server.url(user="listener_service", database="bench_drain")
        with psycopg.connect(url, autocommit=True) as service:
            started = time.perf_counter()
            row = service.execute("SELECT max(keys) FROM listener.drain()").fetchone()
            assert row is not None
            keys = row[0]
            took = time.perf_counter() - started
    return [
        Result(
            f"Draining {options.rows:,} log rows of 1,000 tenants",
            ["what", "seconds", "rows a second"],
            rows=[
                (f"listener.drain(), {keys:,} keys", f"{took:.2f}", f"{options.rows / took:,.0f}"),
                ("floor: the same rows aggregated by a plain SELECT", f"{floor:.2f}", f"{options.rows / floor:,.0f}"),
            ],
        )
    ]
