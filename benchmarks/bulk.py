"""Bulk: one statement that inserts, or updates, very many rows of 1,000 tenants, with and without capture."""

from __future__ import annotations

import argparse
import statistics
import time

import psycopg

from benchmarks.bench import Result, database
from benchmarks.sales import COLUMNS, create_sales, tenant_of
from listener.embedded import EmbeddedServer

TENANTS = 1000


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row per statement: seconds without and with the triggers, medians of alternating runs."""
    result = Result(
        f"One statement over {options.rows:,} rows of 1,000 tenants (s, medians)",
        ["statement", "no trigger", "ours", "slower by", "log rows"],
        note="The targets are 12 % for an insert and 20 % for an update, with a primary key and one index.",
    )
    statements = {
        "INSERT": f"INSERT INTO {{table}} (tenant_id, channel, cents) SELECT {tenant_of(f'n % {TENANTS}')}, 'email', n"
        f" FROM generate_series(1, {options.rows}) n",
        "UPDATE": "UPDATE {table} SET cents = cents + 1",
    }
    with database(server, "bench_bulk") as administrator:
        create_sales(administrator, views=1, tenants=1)
        administrator.execute(f"CREATE TABLE bare {COLUMNS}; CREATE INDEX ON bare (tenant_id, sold_at)".encode())
        for name, statement in statements.items():
            took: dict[str, list[float]] = {"bare": [], "sales": []}
            for _ in range(options.rounds):
                for table, times in took.items():
                    if name == "INSERT":
                        administrator.execute(f"TRUNCATE {table}".encode())
                    else:
                        administrator.execute(f"VACUUM {table}".encode())
                    administrator.execute("TRUNCATE listener.change_log")
                    administrator.execute("CHECKPOINT")
                    with psycopg.connect(server.url(database="bench_bulk"), autocommit=True) as writer:
                        started = time.perf_counter()
                        writer.execute(statement.format(table=table).encode())
                        times.append(time.perf_counter() - started)
            row = administrator.execute("SELECT count(*) FROM listener.change_log").fetchone()
            assert row is not None
            without, ours = statistics.median(took["bare"]), statistics.median(took["sales"])
            result.rows.append((name, f"{without:.2f}", f"{ours:.2f}", f"{ours / without - 1:.0%}", f"{row[0]:,}"))
    return [result]
